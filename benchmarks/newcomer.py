"""How long a newcomer waits for the weights in force: from the learner, or from a worker that has them.

    python -m benchmarks.newcomer [--mb 64 256] [--repeats 7] [--backend ipc|gloo] [--elsewhere]

One row per model size: medians of alternating runs, from the word that there is a newcomer to its last byte, the group
of the two included. The learner can't train while it sends; another worker sends from the thread that receives, while
it generates. `--elsewhere` puts the newcomer on a planted machine of its own. All processes are on this machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from asyncdapo.transport.backend import HOST_ID, Backend
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receive_buffer import ReceiveBuffer
from asyncdapo.weights.sender import WeightSender
from benchmarks.publish import model_of

TIMEOUT_S = 60.0
BUCKET_BYTES = 16 << 20


def live(pipe: Connection, host: str) -> None:
    """A worker: does with its buffer what it is told."""
    torch.set_num_threads(1)
    os.environ[HOST_ID] = host
    buffer = ReceiveBuffer(torch.device("cpu"))
    with suppress(EOFError):
        while True:
            method, *args = pipe.recv()
            answer = getattr(buffer, method)(*args)
            pipe.send(answer.result() if isinstance(answer, Future) else answer)


class Worker:
    def __init__(self, host: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        spawn.Process(target=live, args=(theirs, host), daemon=True).start()

    def start(self, *words: object) -> None:
        self.pipe.send(words)

    def do(self, *words: object) -> Any:
        self.start(*words)
        return self.pipe.recv()


class Learner:
    """The tensors, and this process."""

    def __init__(self, num_mb: int, backend: Backend) -> None:
        self.backend: Backend = backend
        self.tensors = model_of(num_mb)
        self.manifest = Manifest.of(self.tensors)

    def send(self, worker: Worker) -> None:
        group = WeightGroup.create_master("127.0.0.1", 2, self.backend, TIMEOUT_S)
        worker.start("join", group.address, 1, 2, self.backend, self.manifest, TIMEOUT_S)
        group.connect()
        worker.pipe.recv()
        worker.start("receive", 1, 0)
        WeightSender(group, self.manifest, BUCKET_BYTES).send(1, self.tensors)
        worker.pipe.recv()
        group.close()


def pass_on(sender: Worker, newcomer: Worker, backend: Backend) -> None:
    address, manifest = sender.do("host", "127.0.0.1", backend, TIMEOUT_S)
    sender.start("send", 1, 0, BUCKET_BYTES)
    newcomer.do("join", address, 1, 2, backend, manifest, TIMEOUT_S)
    newcomer.do("receive", 1, 0)
    sender.pipe.recv()


def measure(num_mb: int, args: argparse.Namespace) -> None:
    learner = Learner(num_mb, args.backend)
    worker, newcomer = Worker("workers"), Worker("newcomer" if args.elsewhere else "workers")
    learner.send(worker)
    learner_s, worker_s = [], []
    for _ in range(args.repeats):
        began_s = time.perf_counter()
        learner.send(newcomer)
        sent_s = time.perf_counter()
        pass_on(worker, newcomer, args.backend)
        learner_s.append(sent_s - began_s)
        worker_s.append(time.perf_counter() - sent_s)
    row = [statistics.median(seconds[1:]) for seconds in (learner_s, worker_s)]
    print(f"{num_mb:8d}{row[0]:16.3f}{row[1]:16.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, nargs="+", default=[64, 256], help="sizes of the model")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--backend", choices=["ipc", "gloo"], default="ipc")
    parser.add_argument("--elsewhere", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ[HOST_ID] = "workers"
    heads = {"MiB": 8, "from learner s": 16, "from worker s": 16}
    print("".join(f"{head:>{width}}" for head, width in heads.items()))
    for num_mb in args.mb:
        measure(num_mb, args)


if __name__ == "__main__":
    main()
