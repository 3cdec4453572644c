"""Processes of an engine: notices at once when one ends, and ends them.

In: the process ids of the engine's own children. Out: a call in the event loop as soon as one of the family has ended.
The kernel tells (a pidfd becomes readable), without polling and without vLLM's help. A pidfd always refers to the same
process, even after its pid is reused.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import select
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import psutil

from asyncdapo.errors import EngineError

WORKER_NAMES = ("VLLM::", "multiprocessing.spawn")


def child_pids() -> set[int]:
    """Pids of the processes that this one started by `multiprocessing`."""
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


class Family:
    """Children of this process and their workers, at any depth; not short-lived helpers."""

    def __init__(self, pids: Iterable[int]) -> None:
        """Raises EngineError for one that has ended already."""
        try:
            family = [below for pid in pids for below in (pid, *_workers_below(pid))]
            self._pidfds = {pid: os.pidfd_open(pid) for pid in family}
        except (ProcessLookupError, psutil.NoSuchProcess) as error:
            raise EngineError("a process of vLLM's ended as soon as it had started") from error

    def pids(self) -> list[int]:
        return list(self._pidfds)

    def watch(self, on_end: Callable[[int], None]) -> None:
        """Call `on_end(pid)` in the running event loop when one ends; at most once for each."""
        loop = asyncio.get_running_loop()

        def note_end(pid: int) -> None:
            loop.remove_reader(self._pidfds[pid])
            on_end(pid)

        for pid, pidfd in self._pidfds.items():
            loop.add_reader(pidfd, note_end, pid)

    def unwatch(self) -> None:
        for pidfd in self._pidfds.values():
            asyncio.get_running_loop().remove_reader(pidfd)

    def end(self, timeout_s: float) -> None:
        """Block until all have ended; those that still run after `timeout_s` are killed. Call `unwatch` first."""
        for pidfd in self._pidfds.values():
            ends = select.poll()
            ends.register(pidfd, select.POLLIN)
            if not ends.poll(1000 * timeout_s):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                ends.poll()
            os.close(pidfd)
        self._pidfds.clear()


def _workers_below(pid: int) -> Iterator[int]:
    """What this one started by `multiprocessing`, and so on; the command line says it, or the title that vLLM gives."""
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):  # it has gone meanwhile
            if any(name in " ".join(child.cmdline()) for name in WORKER_NAMES):
                yield child.pid
                yield from _workers_below(child.pid)
