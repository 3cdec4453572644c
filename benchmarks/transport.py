"""How many groups a second the replay server takes in, and how soon it acknowledges them.

    python -m benchmarks.transport [--tokens 1024 8192] [--workers 8 64 256] [--rate 0] [--seconds 15] [--dir DIR]

    workers (several a process) ──groups of 16──▶ replay server ──batches of 64──▶ learner
                                ◀──leases, acks──   ledger, payloads

The server is that of a run: a process of its own, CURVE keys, a ledger and segments that are synced before a group is
acknowledged. Workers and learner speak the protocol and do nothing else: a worker has its groups ready, the learner
asks for the next batch at once and reads its tokens. Every group is kept, so every token is received, checked and
written by the server, and read by the learner.

With `--rate` groups are spread over time, that many a second by all workers; 0 is as fast as they are acknowledged.
Each worker holds `--held` leases. `p50` and `p99` are of the time from a worker's `send` until it has read the
acknowledgement. `MB/s` are the tokens and log-probs that come in; as many are read. Under `server`, `workers` and
`learner` stand the cores that each takes, with the threads of ZeroMQ and the kernel's part. `MiB at .1` is the server's
memory after a tenth of the time, `MiB` at the end. `--dir` must be on the disk to be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import tempfile
import time
from array import array
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event, Semaphore
from pathlib import Path

import numpy as np
import psutil

from asyncdapo import messages as wire
from asyncdapo.learner.batches.feed import BatchFeed
from asyncdapo.native.malloc import keep_freed_memory
from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core.state import ReplayState
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.server.server import ReplayServer
from asyncdapo.replay.server.settings import COLLECT_AFTER, ServerSettings
from asyncdapo.shares import NoBatch
from asyncdapo.transport.codec import encode
from asyncdapo.transport.keys import ClientKeys, RunKeys
from benchmarks.fake_workers import (
    GROUP_SIZE,
    HEARTBEAT_S,
    PROMPT_TOKENS,
    VOCAB,
    FakeWorker,
    Load,
    completions_of,
    group_of,
    prompt_at,
)

BATCH, LOOK_S = 64, 0.5
WARM_UP_S = 2.0
JOIN_S = 180.0
"""For all workers to have their first acknowledgement."""
END_S = 30.0
"""For a process to end after it has told its figures."""
CHECKPOINT_EVERY = 10
"""Steps. Then the payloads of older ones are freed."""
UNBOUNDED = 1 << 30
"""Staleness: the weights stay at version 0."""


@dataclass
class Figures:
    """What one process saw. Rows of three or two numbers, one after the other; times are of the system's one clock."""

    name: str
    looks: array = field(default_factory=lambda: array("d"))
    """Time, CPU seconds so far, bytes of memory."""
    acks: array = field(default_factory=lambda: array("d"))
    """Time of an acknowledgement, and seconds that it took."""

    def look(self) -> None:
        process = psutil.Process()
        self.looks.extend((time.monotonic(), sum(process.cpu_times()[:2]), process.memory_info().rss))


async def until_over(figures: Figures, work: Coroutine, over: Event) -> None:
    """Do the work, and look at this process now and then."""
    working = asyncio.create_task(work)
    while not (over.is_set() or working.done()):
        figures.look()
        await asyncio.sleep(LOOK_S)
    working.cancel()
    with suppress(asyncio.CancelledError):
        await working


# ------------------------------------------------------------------------------------------------------------- server


async def serve(figures: Figures, over: Event, load: Load, run_dir: Path, keys: RunKeys, pipe: Connection) -> None:
    """The replay server, and the commands that the controller gives at every step."""
    gc.set_threshold(COLLECT_AFTER)
    ahead = 2 + load.num_workers * load.num_held / BATCH
    config = ReplayConfig(prompts_per_step=BATCH, run_ahead=ahead, max_staleness=UNBOUNDED, heartbeat_s=HEARTBEAT_S)
    make_state = partial(ReplayState, config, FilterConfig(), max_attempts=3, num_prompts=None)
    journal = Journal(run_dir)
    server = ReplayServer(
        ServerSettings(replay=config, group_size=GROUP_SIZE, seed=1, vocab_size=VOCAB),
        lambda recovered: make_state(recovered=recovered),
        journal,
        prompt_at,
        curve=keys.server,
    )

    async def finish_step() -> None:
        step = await asyncio.to_thread(pipe.recv)
        while step:
            await server.trained(step, {})
            await server.published(step)
            server.take_spans()
            if step % CHECKPOINT_EVERY == 0:
                await server.covered(step)
            step = await asyncio.to_thread(pipe.recv)

    async def both() -> None:
        await server.begin()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.run())
            tasks.create_task(finish_step())

    pipe.send((server.rollout_address, server.learner_address))
    await until_over(figures, both(), over)
    journal.close()


# ------------------------------------------------------------------------------------------------------- its two sides


async def learn(figures: Figures, over: Event, address: str, run_dir: Path, keys: ClientKeys, pipe: Connection) -> None:
    feed = BatchFeed(address, run_dir, curve=keys)

    async def take() -> None:
        step = 1
        while True:
            taken = await feed.take(step)
            assert not isinstance(taken, NoBatch), "the data has no end"
            await feed.read(step, taken[1])
            pipe.send(step)
            step += 1

    await until_over(figures, take(), over)
    pipe.send(0)
    feed.close()


async def work(
    figures: Figures, over: Event, address: str, keys: ClientKeys, load: Load, indices: range, served: Semaphore
) -> None:
    """Several rollout workers. `served`: released when each of them has had an acknowledgement."""
    completions, frames = completions_of(load.num_tokens)
    workers = [FakeWorker(index, address, keys, load, completions, frames, figures.acks) for index in indices]

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as tasks:
            for worker in workers:
                tasks.create_task(worker.listen())
                tasks.create_task(worker.beat())
            for worker in workers:
                await worker.served.wait()
            served.release()

    await until_over(figures, all_of_them(), over)
    for worker in workers:
        worker.close()


# ------------------------------------------------------------------------------------------------------------ figures


def run(name: str, work: Callable[..., Coroutine], over: Event, told: Connection, args: tuple) -> None:
    """A process: works until it is over, and tells what it saw. Its heap and its garbage collector are as in a run."""
    keep_freed_memory()
    gc.freeze()
    figures = Figures(name)
    asyncio.run(work(figures, over, *args))
    told.send(figures)


def measure(load: Load, args: argparse.Namespace) -> None:
    spawn = multiprocessing.get_context("spawn")
    over, keys = spawn.Event(), RunKeys.make()
    ours: list[tuple[BaseProcess, Connection]] = []

    def start(name: str, work: Callable[..., Coroutine], *own: object) -> None:
        here, there = spawn.Pipe()
        process = spawn.Process(target=run, args=(name, work, over, there, own), name=name, daemon=True)
        process.start()
        ours.append((process, here))

    with tempfile.TemporaryDirectory(dir=args.dir, prefix="transport-") as run_dir:
        of_server, of_learner = spawn.Pipe()
        start("server", serve, load, Path(run_dir), keys, of_server)
        rollout_address, learner_address = of_learner.recv()
        start("learner", learn, learner_address, Path(run_dir), keys.client, of_learner)
        served, num_processes = spawn.Semaphore(0), min(args.processes, load.num_workers)
        for first in range(num_processes):
            indices = range(first, load.num_workers, num_processes)
            start("workers", work, rollout_address, keys.client, load, indices, served)
        deadline = time.monotonic() + JOIN_S
        for _ in range(num_processes):
            if not served.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"in {JOIN_S:g} s not every worker had an acknowledgement")
        time.sleep(WARM_UP_S)
        began = time.monotonic()
        time.sleep(args.seconds)
        ended = time.monotonic()
        over.set()
        seen = [told_by(process, pipe) for process, pipe in ours]
    print(line_of(load, seen, began, ended), flush=True)


def told_by(process: BaseProcess, pipe: Connection) -> Figures:
    """What it saw, once it has ended. Raises RuntimeError unless it ends with exit code 0."""
    figures = None
    with suppress(EOFError):
        figures = pipe.recv()
    process.join(END_S)
    if figures is None or process.exitcode != 0:
        raise RuntimeError(f"a process of the {process.name} ended with exit code {process.exitcode}, not 0")
    return figures


COLUMNS = (
    "tokens", "workers", "rate", "groups", "groups/s", "MB/s", "p50 ms", "p99 ms", "server", "workers", "learner",
    "MiB at .1", "MiB",
)  # fmt: skip


def line_of(load: Load, seen: list[Figures], began: float, ended: float) -> str:
    """One row of the table, of what was seen from `began` to `ended`. Raises RuntimeError if that was too little."""
    acks = np.concatenate([np.frombuffer(one.acks).reshape(-1, 2) for one in seen])
    acks = acks[(acks[:, 0] >= began) & (acks[:, 0] < ended)]
    if not len(acks):
        raise RuntimeError(f"no group was acknowledged in {ended - began:.1f} s (raise --seconds)")
    cores: dict[str, float] = dict.fromkeys(("server", "workers", "learner"), 0.0)
    for one in seen:
        looks = np.frombuffer(one.looks).reshape(-1, 3)
        looks = looks[(looks[:, 0] >= began) & (looks[:, 0] < ended)]
        if len(looks) < 2:
            what = f"a process of the {one.name} measured itself {len(looks)} times in {ended - began:.1f} s"
            raise RuntimeError(f"{what}, 2 are needed (raise --seconds)")
        (first_s, first_cpu, _), (last_s, last_cpu, _) = looks[0], looks[-1]
        cores[one.name] += (last_cpu - first_cpu) / (last_s - first_s)
        if one.name == "server":
            memory = looks[:, 2] / 2**20
    groups_per_s = len(acks) / (ended - began)
    megabytes_per_s = groups_per_s * (4 * PROMPT_TOKENS + 8 * GROUP_SIZE * load.num_tokens) / 1e6
    p50, p99 = np.quantile(acks[:, 1], (0.5, 0.99)) * 1000
    row = [f"{GROUP_SIZE}x{load.num_tokens}", load.num_workers, f"{load.rate:g}", len(acks), f"{groups_per_s:.0f}"]
    row += [f"{megabytes_per_s:.0f}", f"{p50:.1f}", f"{p99:.1f}", *(f"{part:.2f}" for part in cores.values())]
    row += [f"{memory[len(memory) // 10]:.1f}", f"{memory[-1]:.1f}"]
    return "".join(f"{cell!s:>{len(column) + 3}}" for cell, column in zip(row, COLUMNS, strict=True))


def describe_wire(num_tokens: int) -> str:
    """What a group weighs on the wire."""
    completions, frames = completions_of(num_tokens)
    lease = wire.Lease(lease_id=10**6, branch=0, attempt=1, group_size=GROUP_SIZE, seed=1, prompt=prompt_at(10**6))
    header, *_ = encode(wire.GroupDone(group=group_of(lease, 100, completions)))
    total, num = len(header) + sum(map(len, frames)), GROUP_SIZE * num_tokens
    return f"{GROUP_SIZE} x {num_tokens} tokens: {total:,} bytes, {total / num:.2f} a token, {len(header):,} of header"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192], help="of a completion")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--rate", type=float, nargs="+", default=[0.0], help="groups a second of all workers")
    parser.add_argument("--held", type=int, default=1, help="leases that a worker holds at once")
    parser.add_argument("--processes", type=int, default=2, help="in which the workers are")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--dir", type=Path, default=Path())
    args = parser.parse_args()
    for num_tokens in args.tokens:
        print(describe_wire(num_tokens))
    print("".join(f"   {column}" for column in COLUMNS))
    for num_tokens in args.tokens:
        for num_workers in args.workers:
            for rate in args.rate:
                measure(Load(num_tokens, num_workers, args.held, rate), args)


if __name__ == "__main__":
    main()
