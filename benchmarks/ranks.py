"""Time of one sum of gradients over the learner's ranks, over Gloo between processes of this machine.

    python benchmarks/ranks.py [--ranks 2 4] [--mb 4 64 512] [--repeats 5]

One row per number of ranks and size of the fp32 gradients: the median over the repeats of rank 0's time, including
copies into buckets and back, and the gradients per second that follow from it. Rank 0 starts each sum when all ranks
are ready.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import torch

from asyncdapo.learner.step.ranks import GradientGroup, Ranks

TIMEOUT_S = 60.0
NUM_TENSORS = 48


def parameters_of(num_mb: int) -> list[torch.nn.Parameter]:
    """Equal matrices with a gradient each."""
    rows = max(1, (num_mb << 20) // 4 // NUM_TENSORS // 256)
    parameters = [torch.nn.Parameter(torch.zeros(rows, 256)) for _ in range(NUM_TENSORS)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return parameters


def take_part(group: GradientGroup, num_mb: int, repeats: int) -> list[float]:
    """Seconds of each sum."""
    ranks, parameters = Ranks(group.rank, group.world_size), parameters_of(num_mb)
    ranks.join(group)
    times = []
    for _ in range(repeats + 1):
        ranks.check_same(0, "turn")
        began_s = time.perf_counter()
        ranks.sum_gradients(parameters)
        times.append(time.perf_counter() - began_s)
    return times[1:]


def serve(pipe: Connection, rank: int) -> None:
    torch.set_num_threads(1)
    address, num_ranks, num_mb, repeats = pipe.recv()
    take_part(GradientGroup.join(address, rank, num_ranks, "gloo", TIMEOUT_S), num_mb, repeats)


def measure(num_ranks: int, num_mb: int, repeats: int) -> None:
    spawned = multiprocessing.get_context("spawn")
    group = GradientGroup.create_master("127.0.0.1", num_ranks, "gloo", TIMEOUT_S)
    processes = []
    for rank in range(1, num_ranks):
        ours, theirs = spawned.Pipe()
        processes.append(spawned.Process(target=serve, args=(theirs, rank), daemon=True))
        processes[-1].start()
        ours.send((group.address, num_ranks, num_mb, repeats))
    group.connect()
    median_s = statistics.median(take_part(group, num_mb, repeats))
    for process in processes:
        process.join()
    group.close()
    print(f"{num_ranks:6d}{num_mb:8d}{median_s * 1e3:12.1f}{(num_mb << 20) / 1e9 / median_s:12.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mb", type=int, nargs="+", default=[4, 64, 512], help="MiB of fp32 gradients")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'ranks':>6}{'MiB':>8}{'ms':>12}{'GB/s':>12}")
    for num_ranks in args.ranks:
        for num_mb in args.mb:
            measure(num_ranks, num_mb, args.repeats)


if __name__ == "__main__":
    main()
