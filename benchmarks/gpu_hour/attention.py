"""Kernels of packed attention: how far each is from float64, with grouped heads and shared prompts, and how fast.

repeated heads    what the learner does (`learner.attention`): keys and values repeated for all query heads
enable_gqa        the kernel's own grouped heads, from torch 2.13 on
FA3               flash attention 3, where this torch can switch to it
rectangles        padded lines, what the learner does without the kernel
"""

from __future__ import annotations

import inspect
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from asyncdapo.learner.attention import attention
from asyncdapo.learner.attention.attention_layout import Layout
from benchmarks.gpu_hour.check import Figures, hold, main

SIZES = {"0.5b": (14, 2, 64), "1.5b": (12, 2, 128)}
"""Query heads, key and value heads, numbers of a head."""
APART = 0.02
NUM_TIMES = 5

Attend = Callable[[Tensor, Tensor, Tensor, Layout], Tensor]


def measure(figures: Figures, args: Namespace) -> None:
    device = torch.device("cpu" if args.cpu else "cuda")
    dtype = torch.float32 if args.cpu else torch.bfloat16
    said = []
    for size, heads in {"small": (4, 2, 16)}.items() if args.cpu else SIZES.items():
        small, large = _layout(device, 2, 3, 40), _layout(device, *((2, 2, 60) if args.cpu else (4, 8, 1024)))
        rows = {}
        for name, attend in _kernels(args.cpu).items():
            rows[name] = _row(attend, small, large, heads, dtype)
            figures.add(**{size: rows})
        wrong = {name: row["apart"] for name, row in rows.items() if row.get("apart", 0) > APART}
        hold(not wrong, f"{size}: far from float64: {wrong}")
        ours = next(iter(rows))
        hold("ms" in rows[ours], f"{size}: {ours}: {rows[ours]}")
        said.append(f"{size}: " + ", ".join(f"{name} {row.get('ms', row)}" for name, row in rows.items()))
    figures.add(summary="ms, " + "; ".join(said))


def _kernels(cpu: bool) -> dict[str, Attend]:
    if cpu:
        return {"rectangles": _rectangles}
    from torch.nn.attention.varlen import varlen_attn

    kernels: dict[str, Attend] = {"repeated heads": _repeated}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        kernels["enable_gqa"] = _grouped
    listed = getattr(torch.nn.attention, "list_flash_attention_impls", list)
    for name in map(str, listed()):
        kernels[name] = partial(_switched, name)
    return kernels | {"rectangles": _rectangles}


def _rectangles(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    return attention._by_rectangles(query, key, value, layout.rectangles, None, None)


def _repeated(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    return attention._by_segments(query, key, value, layout.segments, None, None)


def _grouped(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    segments = layout.segments
    keys, values = (attention.gather_rows(flat, segments.keys_K).contiguous() for flat in (key, value))
    ends = segments.ends_of_queries, segments.ends_of_keys, segments.max_queries, segments.max_keys
    return varlen_attn(query, keys, values, *ends, window_size=(-1, 0), enable_gqa=True)


def _switched(name: str, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """With another flash attention under the same call."""
    torch.nn.attention.activate_flash_attention_impl(name)
    try:
        return _repeated(query, key, value, layout)
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def _layout(device: torch.device, num_prompts: int, group_size: int, num_tokens: int) -> Layout:
    """Groups behind their prompts, of a quarter of the tokens; responses of uneven lengths."""
    starts, prompts, lengths, at = [], [], [], 0
    for _ in range(num_prompts):
        prompt, at = at, at + num_tokens // 4
        for number in range(group_size):
            prompts.append(prompt)
            starts.append(at)
            lengths.append(num_tokens * (number + 1) // group_size)
            at += lengths[-1]
    num_prompt = np.full(len(starts), num_tokens // 4)
    return Layout(np.array(prompts), num_prompt, np.array(starts), np.array(lengths), device)


def _row(attend: Attend, small: Layout, large: Layout, heads: tuple[int, int, int], dtype: torch.dtype) -> dict:
    """A kernel that can't be used says why; the others are measured all the same."""
    try:
        return {
            "apart": float(f"{_apart(attend, small, heads, dtype):.2g}"),
            "ms": _milliseconds(attend, large, heads, dtype),
        }
    except (RuntimeError, ImportError, ValueError) as error:
        return {"failure": str(error).partition("\n")[0][:200]}


def _inputs(layout: Layout, heads: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    queries, keys, size = heads
    shapes = [(layout.num_tokens, number, size) for number in (queries, keys, keys)]
    return [torch.randn(shape, device=layout.device).to(dtype).requires_grad_() for shape in shapes]


def _apart(attend: Attend, layout: Layout, heads: tuple[int, int, int], dtype: torch.dtype) -> float:
    """Of the result and of the three gradients, the furthest from float64 over rectangles."""
    inputs = _inputs(layout, heads, dtype)
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
    on_cpu = replace(layout, device=torch.device("cpu"))
    weights = torch.randn(layout.num_tokens, *inputs[0].shape[1:], dtype=torch.float64)
    wanted = attention._by_rectangles(*exact, on_cpu.rectangles, None, None)
    (wanted * weights).sum().backward()
    found = attend(*inputs, layout)
    (found * weights.to(found)).sum().backward()
    pairs = [(found, wanted), *((one.grad, other.grad) for one, other in zip(inputs, exact, strict=True))]
    return max(((one.detach().double().cpu() - other).norm() / other.norm()).item() for one, other in pairs)


def _milliseconds(attend: Attend, layout: Layout, heads: tuple[int, int, int], dtype: torch.dtype) -> float:
    """Of both passes, the least of some."""
    inputs, times = _inputs(layout, heads, dtype), []
    for _ in range(NUM_TIMES + 2):
        _settle(layout.device)
        began_s = time.perf_counter()
        attend(*inputs, layout).sum().backward()
        _settle(layout.device)
        times.append(time.perf_counter() - began_s)
    return round(1000 * min(times[2:]), 3)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(measure)
