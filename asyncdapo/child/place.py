"""A place for one child process after another: a process that has ended is replaced.

In: a function that starts one. Out: the live process, whenever it is asked for. A process that fails repeatedly is
started ever more slowly, and one that can't be started ends whoever asks. Does not own: the process (`process`), what
became of the work of one that ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from asyncdapo.child.process import ChildProcess
from asyncdapo.errors import RunError

MAX_STARTS = 3
BACKOFF_S = (0.0, 0.0, 0.1, 0.5, 2.0)
"""Pause before a process is started, by the number of failures in a row before it. The first is replaced at once."""

P = TypeVar("P", bound=ChildProcess)


class Place(Generic[P]):
    """A place for one process after another."""

    def __init__(self, kind: str, start: Callable[[], Awaitable[P]], log: logging.Logger) -> None:
        """`kind`: what the processes are called, such as `verifier process`. `start` raises RunError if it can't."""
        self._kind, self._start, self._log = kind, start, log
        self.current: P | None = None
        self.num_restarts = 0
        """Processes that were replaced because they ended, or were killed for a fault of theirs."""
        self._num_failed = 0
        """Processes in a row that ended, or didn't start, before they did any work."""
        self._starting = asyncio.Lock()
        self._closed = False

    async def process(self) -> P:
        """The live process; if the last one is gone, a fresh one, started after a pause if it failed repeatedly. Raises
        RunError after `MAX_STARTS` failures."""
        async with self._starting:
            if self.current is not None and self.current.alive:
                return self.current
            await self._bury()
            return await self._start_one()

    async def empty(self) -> None:
        """End the process if there is one, and wait until it is gone."""
        async with self._starting:
            await self._bury()

    async def _bury(self) -> None:
        if self.current is None:
            return
        process, was_alive = self.current, self.current.alive
        how = await process.end()
        self.current = None
        if was_alive or process.killed_for == "":
            return
        self._num_failed += 1
        self.num_restarts += 1
        why = process.killed_for or how
        self._log.warning("%s %d: %s; a fresh one takes its place", self._kind, process.pid, why)

    async def _start_one(self) -> P:
        for left in reversed(range(MAX_STARTS)):
            await asyncio.sleep(BACKOFF_S[min(self._num_failed, len(BACKOFF_S) - 1)])
            if self._closed:
                raise RunError(f"the place of a {self._kind} has been closed")
            try:
                self.current = await self._start()
                return self.current
            except RunError as error:
                problem = f"no {self._kind} can be started: {error}"
                self._log.warning("%s (%d more tries)", problem, left)
                self._num_failed += 1
        raise RunError(problem)

    def note_work(self) -> None:
        """The process has done some of its work: the next failure is the first in a row."""
        self._num_failed = 0

    async def close(self) -> None:
        """End the process. No other is started."""
        self._closed = True
        if self.current is not None:
            await self.current.end()
