"""Memory and time of log-probs from hidden states, forward and backward, in chunks against the plain computation.

    python benchmarks/logprobs_memory.py [--tokens 20480] [--hidden 64] [--vocabulary 1024 8192 32768 131072]
                                         [--threads 1] [--repeats 1]

One row per vocabulary. Growth is the process's peak resident memory minus its memory just before. It includes the
gradients of hidden states and weight, but not the inputs. Each number comes from a process of its own, because a peak
never falls. `logits` is one [tokens, vocabulary] tensor in float32; plain autograd makes about four of them. A plain
run that needs more than the available memory is skipped and shown as `-`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
from torch import Tensor

from asyncdapo.learner.model.logprobs import linear_logprobs

MIB = 1 << 20
PLAIN_COPIES = 5
"""Tensors of the logits' size to have room for before the plain computation is tried."""


def plain_logprobs(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, *, temperature: float):
    logprobs_NV = (hidden_NH @ weight_VH.T / temperature).log_softmax(-1)
    logp_N = logprobs_NV.gather(-1, targets_N[:, None])[:, 0]
    detached_NV = logprobs_NV.detach()
    return logp_N, -(detached_NV.exp() * detached_NV).sum(-1)


PATHS = {"chunked": linear_logprobs, "plain": plain_logprobs}


def memory_mib(field: str) -> float:
    """A field of this process's status: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def work(pipe: Connection, path: str, num_columns: int, args: argparse.Namespace) -> None:
    """Sends the growth of memory (MiB) and the time (s) of the fastest repeat."""
    torch.set_num_threads(args.threads)
    step(path, *inputs(8, args.hidden, 16))  # so that what the first call loads is not counted
    case = inputs(args.tokens, args.hidden, num_columns)
    before_mib = memory_mib("VmRSS")
    times_s = [step(path, *case) for _ in range(args.repeats)]
    pipe.send((memory_mib("VmHWM") - before_mib, min(times_s)))


def inputs(num_tokens: int, size: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden_NH = torch.randn(num_tokens, size, requires_grad=True)
    weight_VH = torch.randn(num_columns, size).mul_(size**-0.5).requires_grad_()
    return hidden_NH, weight_VH, torch.randint(num_columns, (num_tokens,))


def step(path: str, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> float:
    hidden_NH.grad = weight_VH.grad = None
    began_s = time.perf_counter()
    PATHS[path](hidden_NH, weight_VH, targets_N, temperature=0.9)[0].mean().backward()
    return time.perf_counter() - began_s


def measure(path: str, num_columns: int, args: argparse.Namespace) -> tuple[str, str]:
    if path == "plain" and PLAIN_COPIES * args.tokens * num_columns * 4 / MIB > available_mib():
        return "-", "-"
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=work, args=(theirs, path, num_columns, args))
    process.start()
    theirs.close()
    growth_mib, time_s = ours.recv()  # EOFError when it was killed for its memory
    process.join()
    return f"{growth_mib:,.0f}", f"{time_s:.2f}"


def available_mib() -> float:
    return psutil.virtual_memory().available / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[1024, 8192, 32768, 131072])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    print(f"{args.tokens:,} tokens, hidden size {args.hidden}, float32, {args.threads} threads; MiB and s\n")
    print("| vocabulary | logits | chunked | plain | chunked, time | plain, time |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for num_columns in args.vocabulary:
        chunked, plain = (measure(path, num_columns, args) for path in PATHS)
        logits = f"{args.tokens * num_columns * 4 / MIB:,.0f}"
        cells = [f"{num_columns:,}", logits, chunked[0], plain[0], chunked[1], plain[1]]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
