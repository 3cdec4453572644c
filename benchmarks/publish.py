"""Publish bandwidth against a plain broadcast of the same bytes, over Gloo between processes of this machine.

    python benchmarks/publish.py [--receivers 1] [--mb 4 64 512] [--repeats 9] [--dtype float32]

One row per size, medians of alternating runs, timed on the sender until every receiver has answered. `plain` is one
broadcast of one tensor into memory that exists already; `fresh` receives it into new memory, as every publish must
(the engine still generates with the old weights). A publish adds buckets, conversion, and a checksum on both ends.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from asyncdapo.transport.process_group import Deadline
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.layout import Manifest
from asyncdapo.weights.receiver import WeightReceiver
from asyncdapo.weights.sender import WeightSender

TIMEOUT_S = 60.0
BUCKET_BYTES = 64 << 20


def model_of(num_mb: int) -> dict[str, torch.Tensor]:
    """fp32 tensors in the proportions of a small language model: an embedding of a quarter, then layers."""
    num_layers, num_elements = 12, (num_mb << 20) // 4
    tensors = {"embed": torch.randn(num_elements // 4)}
    for layer in range(num_layers):
        per_layer = num_elements * 3 // 4 // num_layers
        tensors |= {f"{layer}.{part}": torch.randn(per_layer // 8) for part in range(8)}
        tensors[f"{layer}.norm"] = torch.randn(512)
    return tensors


def receive(pipe: Connection, rank: int) -> None:
    torch.set_num_threads(1)
    address, world_size, manifest, repeats = pipe.recv()
    group = WeightGroup.join(address, rank, world_size, "gloo", TIMEOUT_S)
    receiver = WeightReceiver(group, manifest, torch.device("cpu"))
    kept_U = torch.zeros(manifest.num_bytes, dtype=torch.uint8)
    for version in range(repeats):
        plain(group, kept_U)
        plain(group, torch.empty(manifest.num_bytes, dtype=torch.uint8))
        receiver.receive(version)


def plain(group: WeightGroup, bytes_U: torch.Tensor) -> None:
    deadline = Deadline(TIMEOUT_S)
    group.broadcast(bytes_U, deadline).wait()
    group.exchange(0, deadline)


def seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def measure(num_mb: int, dtype: torch.dtype, num_receivers: int, repeats: int) -> None:
    tensors = model_of(num_mb)
    manifest = Manifest.of(tensors, dtype)
    group = WeightGroup.create_master("127.0.0.1", num_receivers + 1, "gloo", TIMEOUT_S)
    for rank in range(1, num_receivers + 1):
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        multiprocessing.get_context("spawn").Process(target=receive, args=(theirs, rank), daemon=True).start()
        ours.send((group.address, num_receivers + 1, manifest, repeats))
    group.connect()
    sender = WeightSender(group, manifest, BUCKET_BYTES)
    bytes_U = torch.zeros(manifest.num_bytes, dtype=torch.uint8)
    timings: dict[str, list[float]] = {"plain": [], "fresh": [], "publish": []}
    for version in range(repeats):
        timings["plain"].append(seconds(lambda: plain(group, bytes_U)))
        timings["fresh"].append(seconds(lambda: plain(group, bytes_U)))
        timings["publish"].append(seconds(lambda version=version: sender.send(version, tensors)))
    medians = {name: statistics.median(values[1:]) for name, values in timings.items()}
    cells = "".join(f"{manifest.num_bytes / 1e9 / median:14.2f}" for median in medians.values())
    share = medians["fresh"] / medians["publish"]
    print(f"{manifest.num_bytes / 2**20:8.1f}{cells}{share:15.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--receivers", type=int, default=1)
    parser.add_argument("--mb", type=int, nargs="+", default=[4, 64, 512], help="sizes of the learner's fp32 model")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", default="float32", help="dtype on the wire")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'MiB':>8}{'plain GB/s':>14}{'fresh GB/s':>14}{'publish GB/s':>14}{'publish/fresh':>15}")
    for num_mb in args.mb:
        measure(num_mb, getattr(torch, args.dtype), args.receivers, args.repeats)


if __name__ == "__main__":
    main()
