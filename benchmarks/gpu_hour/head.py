"""The output layer in chunks (`learner.logprobs`): time and memory of a forward and backward pass by the size and width
of a chunk, beside one whole tensor of logits."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor

from asyncdapo.learner.model import logprobs
from benchmarks.gpu_hour.check import Figures, hold, main

GIB = 1 << 30
CHUNKS = {f"{1 << rows}x{1 << columns}": (1 << rows + columns, 1 << columns) for rows, columns in (
    (10, 15), (11, 14), (12, 13), (12, 15), (13, 14), (14, 13), (14, 15),
)}  # fmt: skip
"""Tokens times columns: scores in a chunk, and most columns of one. The first is what the learner has."""
SIZES = {"0.5b": (8192, 896, 151_936), "1.5b": (8192, 1536, 151_936)}
"""Tokens, hidden size, vocabulary."""
SMALL_CHUNKS, SMALL_SIZES = {"64x128": (1 << 13, 128), "256x64": (1 << 14, 64)}, {"small": (256, 64, 1000)}
NUM_TIMES = 5


def measure(figures: Figures, args: Namespace) -> None:
    kind = "cpu" if args.cpu else "cuda"
    sizes, chunks = (SMALL_SIZES, SMALL_CHUNKS) if args.cpu else (SIZES, CHUNKS)
    best = {}
    for size, (num_tokens, hidden, vocabulary) in sizes.items():
        torch.manual_seed(0)
        dtype = torch.float32 if args.cpu else torch.bfloat16
        hidden_NH = torch.randn(num_tokens, hidden, device=kind, dtype=dtype).requires_grad_()
        weight_VH = (torch.randn(vocabulary, hidden, device=kind, dtype=dtype) * 0.04).requires_grad_()
        targets_N = torch.randint(0, vocabulary, (num_tokens,), device=kind)
        inputs = hidden_NH, weight_VH, targets_N
        rows = {"whole": _timed(_whole, inputs)}
        for compiled in (False,) if args.cpu else (False, True):
            if compiled:
                logprobs.compile_chunks()
            for name, (elements, columns) in chunks.items():
                logprobs.CHUNK_ELEMENTS[kind], logprobs.COLUMNS = elements, columns
                rows[name + " compiled" * compiled] = _timed(_chunked, inputs)
                figures.add(**{size: rows})
        hold(all(abs(row["sum"] / rows["whole"]["sum"] - 1) < 0.01 for row in rows.values()), f"{size}: {rows}")
        in_chunks = [name for name in rows if name != "whole"]
        best[size] = min(in_chunks, key=lambda name: rows[name]["ms"])
        times = " ".join(f"{name}: {rows[name]['ms']} ms," for name in ("whole", in_chunks[0]))
        best[size] = f"{size} {times} best {best[size]}: {rows[best[size]]['ms']} ms"
    figures.add(summary="; ".join(best.values()))


def _whole(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = (hidden_NH @ weight_VH.T).float()
    return logits_NV.log_softmax(-1).gather(-1, targets_N[:, None])[:, 0]


def _chunked(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    return logprobs.linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=1.0)[0]


def _timed(compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Milliseconds of both passes, the least of some; GiB at their peak over what was there; the sum, to compare."""
    times, on_gpu = [], inputs[0].is_cuda
    for number in range(NUM_TIMES + 2):
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        began_s = time.perf_counter()
        total = compute(*inputs).sum()
        total.backward()
        if on_gpu:
            torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - began_s)
        peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
        for tensor in inputs[:2]:
            tensor.grad = None
    return {"ms": round(1000 * min(times), 2), "gib": round(peak / GIB, 2), "sum": total.item()}


if __name__ == "__main__":
    main(measure)
