"""Publish bandwidth against a plain broadcast of the same bytes on the same group, between processes of this machine.

    python benchmarks/publish.py [--backend ipc|gloo] [--receivers 1 2 4] [--hosts learner] [--mb 64 256 1024]
                                 [--repeats 9] [--dtype float32] [--bucket-mb 16] [--threads 1] [--shards 1]

One row per model size and number of receivers: medians of alternating runs, timed on the sender until every receiver
has answered. `plain` is one broadcast of one tensor by Gloo, into allocated memory. A publish adds buckets, the
conversion to the dtype of the wire, and a checksum on every end; its receivers also reuse their memory. With `--shards`
the learner is as many processes, and each bucket is gathered from them first.

`--hosts` plants machines: receivers are dealt to them in turn, and `learner` is the learner's own. The last two columns
are what the kernel counted on the sender's connections: bytes that it sent in one plain broadcast and in one publish,
divided by the model's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.distributed.tensor import Shard, distribute_tensor

from asyncdapo.learner.model.mesh import SHARDS
from asyncdapo.learner.step.ranks import GradientGroup, Ranks
from asyncdapo.transport.backend import HOST_ID, Backend
from asyncdapo.transport.deadline import Deadline
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receiver import WeightReceiver
from asyncdapo.weights.sender import WeightSender
from asyncdapo.weights.shards import Giver, Shards

TIMEOUT_S = 60.0
LEARNER = "learner"
"""The planted host of the learner."""
BYTES_ACKED = 120
"""Where Linux's `tcp_info` has the bytes that the peer has acknowledged: 64 bits."""


def model_of(num_mb: int) -> dict[str, torch.Tensor]:
    """fp32 tensors in the proportions of a small language model: an embedding of a quarter, then layers."""
    num_layers, num_elements = 12, (num_mb << 20) // 4
    tensors = {"embed": torch.randn(num_elements // 4)}
    for layer in range(num_layers):
        per_layer = num_elements * 3 // 4 // num_layers
        tensors |= {f"{layer}.{part}": torch.randn(per_layer // 8) for part in range(8)}
        tensors[f"{layer}.norm"] = torch.randn(512)
    return tensors


def receive(pipe: Connection, rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    os.environ[HOST_ID] = args.hosts[(rank - 1) % len(args.hosts)]
    address, world_size, backend, manifest, repeats = pipe.recv()
    group = WeightGroup.join(address, rank, world_size, backend, TIMEOUT_S)
    receiver = WeightReceiver(group, manifest, torch.zeros(manifest.offsets[-1], dtype=torch.uint8))
    kept_U = torch.zeros(manifest.num_bytes, dtype=torch.uint8)
    for version in range(repeats):
        plain(group, kept_U)
        receiver.receive(version)
    group.close()


def divided(tensors: dict[str, torch.Tensor], group: GradientGroup) -> dict[str, torch.Tensor]:
    """This rank's shards."""
    ranks = Ranks(group.rank, group.world_size, group.world_size)
    ranks.join(group)
    mesh = ranks.mesh(torch.device("cpu"))[SHARDS]
    return {name: distribute_tensor(one, mesh, [Shard(0)], src_data_rank=None) for name, one in tensors.items()}


def give(pipe: Connection, rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    address, num_mb = pipe.recv()
    group = GradientGroup.join(address, rank, args.shards, "gloo", TIMEOUT_S)
    tensors = divided(model_of(num_mb), group)
    manifest = Manifest.of(tensors, getattr(torch, args.dtype))
    giver = Giver(Shards(tensors), manifest, args.bucket_mb << 20)
    for _ in range(args.repeats):
        giver.give(tensors, TIMEOUT_S)


def plain(group: WeightGroup, bytes_U: torch.Tensor) -> None:
    deadline = Deadline(TIMEOUT_S)
    group.broadcast(bytes_U, deadline).wait()
    group.exchange(0, deadline)


def seconds_and_bytes(work: Callable[[], object]) -> tuple[float, int]:
    """What it takes, and what this process sends meanwhile."""
    before = bytes_sent()
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s, bytes_sent() - before


def bytes_sent() -> int:
    """By all TCP connections that this process has."""
    total = 0
    for file in Path("/proc/self/fd").iterdir():
        if file.is_socket():
            with socket.socket(fileno=os.dup(int(file.name))) as one, suppress(OSError):  # not all are of TCP
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("<Q", info, BYTES_ACKED)[0]
    return total


def started(work: Callable[..., None], args: tuple, told: tuple) -> multiprocessing.process.BaseProcess:
    """A process that does `work(pipe, *args)` and is told something."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=work, args=(theirs, *args), daemon=True)
    process.start()
    ours.send(told)
    return process


def measure(num_mb: int, num_receivers: int, backend: Backend, args: argparse.Namespace) -> None:
    tensors = model_of(num_mb)
    manifest = Manifest.of(tensors, getattr(torch, args.dtype))
    group = WeightGroup.create_master("127.0.0.1", num_receivers + 1, backend, TIMEOUT_S)
    processes = [
        started(receive, (rank, args), (group.address, num_receivers + 1, backend, manifest, args.repeats))
        for rank in range(1, num_receivers + 1)
    ]
    if args.shards > 1:
        shard_group = GradientGroup.create_master("127.0.0.1", args.shards, "gloo", TIMEOUT_S)
        processes += [started(give, (rank, args), (shard_group.address, num_mb)) for rank in range(1, args.shards)]
        shard_group.connect()
        tensors = divided(tensors, shard_group)
    group.connect()
    sender = WeightSender(group, manifest, args.bucket_mb << 20, Shards(tensors))
    bytes_U = torch.ones(manifest.num_bytes, dtype=torch.uint8)  # zeros would all be one page of memory
    plains, publishes = [], []
    for version in range(args.repeats):
        plains.append(seconds_and_bytes(lambda: plain(group, bytes_U)))
        publishes.append(seconds_and_bytes(lambda version=version: sender.send(version, tensors)))
    group.close()
    for process in processes:
        process.join()
    (plain_s, plain_sent), (publish_s, publish_sent) = (
        map(statistics.median, zip(*values[1:], strict=True)) for values in (plains, publishes)
    )
    num_bytes = manifest.num_bytes
    plain_rate, publish_rate = num_bytes / 1e9 / plain_s, num_bytes / 1e9 / publish_s
    print(
        f"{num_bytes / 2**20:8.1f}{num_receivers:11d}{plain_rate:13.2f}{publish_rate:15.2f}{plain_s / publish_s:16.2f}"
        f"{plain_sent / num_bytes:13.2f}{publish_sent / num_bytes:15.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["ipc", "gloo"], default="ipc")
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hosts", nargs="+", default=[LEARNER], help="of the receivers, in turn")
    parser.add_argument("--mb", type=int, nargs="+", default=[64, 256, 1024], help="sizes of the learner's fp32 model")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", default="float32", help="dtype on the wire")
    parser.add_argument("--bucket-mb", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch in each process")
    parser.add_argument("--shards", type=int, default=1, help="processes of the learner")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ[HOST_ID] = LEARNER
    heads = {"MiB": 8, "receivers": 11, "plain GB/s": 13, "publish GB/s": 15, "publish/plain": 16}
    heads |= {"plain sent": 13, "publish sent": 15}
    print("".join(f"{head:>{width}}" for head, width in heads.items()))
    for num_mb in args.mb:
        for num_receivers in args.receivers:
            measure(num_mb, num_receivers, args.backend, args)


if __name__ == "__main__":
    main()
