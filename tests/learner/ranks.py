"""Ranks of a learner for tests, over real Gloo: in threads of this process, or in processes that can be killed.

Work is a function of `Ranks`; in processes it stands at the top of a module. The fork server imports torch and the
learner once, a process then starts in a few hundredths of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from asyncdapo.errors import RunError
from asyncdapo.learner.step.ranks import GradientGroup, Ranks

T = TypeVar("T")
JOIN_TIMEOUT_S = 20.0

spawned = multiprocessing.get_context("forkserver")
spawned.set_forkserver_preload([__name__, "tests.learner.tiny"])


def in_threads(num_ranks: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns at each rank, in the order of ranks. The first error of any is raised; the others' groups are
    closed then, so none waits."""
    host = GradientGroup.create_master("127.0.0.1", num_ranks, "gloo", JOIN_TIMEOUT_S)
    groups: list[GradientGroup] = [host]

    def at(rank: int) -> T:
        if rank:
            group = GradientGroup.join(host.address, rank, num_ranks, "gloo", JOIN_TIMEOUT_S)
            groups.append(group)
        else:
            group = host
            group.connect()
        try:
            return work(_joined(group))
        except BaseException:
            for other in groups:
                other.close()
            raise

    with ThreadPoolExecutor(num_ranks) as threads:
        futures = [threads.submit(at, rank) for rank in range(num_ranks)]
    for group in groups:
        group.close()
    return [future.result() for future in futures]


class RankProcess:
    """One rank in a process of its own."""

    def __init__(self, rank: int, num_ranks: int, work: Callable[..., Any], *args: Any) -> None:
        self._pipe, theirs = spawned.Pipe()
        self.process = spawned.Process(target=_serve, args=(theirs, rank, num_ranks, work, args), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, address: str) -> None:
        self._pipe.send(address)

    def result(self) -> Any:
        """What the work returned, or the RunError that it raised. Raises EOFError when the process died."""
        return pickle.loads(self._pipe.recv_bytes())

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def in_processes(num_ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(ranks, *args)` returns or raises (RunError) at each rank; None of one that was killed."""
    processes = [RankProcess(rank, num_ranks, work, *args) for rank in range(num_ranks)]
    try:
        address = processes[0].result()
        for process in processes[1:]:
            process.tell(address)
        return [_outcome(process) for process in processes]
    finally:
        for process in processes:
            process.stop()


def die() -> None:
    """As `kill -9` does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def _outcome(process: RankProcess) -> Any:
    try:
        return process.result()
    except EOFError:
        return None


def with_shards(ranks: Ranks, num_shards: int) -> Ranks:
    """The same rank in a mesh of so many shards; the mesh before ends."""
    return _joined(ranks._group, num_shards)


def _joined(group: GradientGroup, num_shards: int = 1) -> Ranks:
    ranks = Ranks(group.rank, group.world_size, num_shards)
    ranks.join(group)
    return ranks


def _serve(pipe: Connection, rank: int, num_ranks: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if rank:
        group = GradientGroup.join(pipe.recv(), rank, num_ranks, "gloo", JOIN_TIMEOUT_S)
    else:
        group = GradientGroup.create_master("127.0.0.1", num_ranks, "gloo", JOIN_TIMEOUT_S)
        pipe.send_bytes(pickle.dumps(group.address))
        group.connect()
    try:
        outcome = work(_joined(group), *args)
    except RunError as error:
        outcome = error
    pipe.send_bytes(pickle.dumps(outcome))  # a pipe's own way leaves tensors in memory that ends with this process
