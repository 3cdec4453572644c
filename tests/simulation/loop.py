"""An event loop whose clock is a number: it jumps to the next timer whenever nothing is ready.

In: coroutines. Out: the same order of steps every time, in as little real time as the steps take. There is no I/O and
no thread, so that everything that happens is either ready, in the order in which it became so, or due at a known time.
Does not own: chance; whoever wants some draws it from the seed (`plan`).
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from itertools import count
from typing import Any

MAX_STEPS = 1_000_000


class Handle:
    """A callback to come. Cancelled ones stay where they are and do nothing."""

    __slots__ = ("_at", "callback", "args", "context")

    def __init__(self, at: float, callback: Callable[..., object], args: tuple, context: Context | None) -> None:
        self._at, self.callback, self.args = at, callback, args
        self.context = copy_context() if context is None else context

    def cancel(self) -> None:
        self.callback = None

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self._at


class Deadline(Exception):  # noqa: N818 - says when, not what went wrong
    """The clock has come to the end of what was granted."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as tasks, futures, timeouts and task groups need."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._numbers = count()
        self.num_steps = 0

    def run(self, work: Coroutine[Any, Any, Any], deadline: Callable[[], float]) -> Any:
        """The result of `work`. Raises Deadline when the clock would go past `deadline()` before it is there."""
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            main = self.create_task(work)
            while not main.done():
                if not self._ready:
                    self._jump(deadline())
                self._step()
            return main.result()
        finally:
            asyncio._set_running_loop(before)

    def drain(self) -> None:
        """Let what was cancelled come to its end, without any time passing."""
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            while self._ready:
                self._step()
        finally:
            asyncio._set_running_loop(before)

    def _step(self) -> None:
        self.num_steps += 1
        assert self.num_steps < MAX_STEPS, "steps without an end"
        handle = self._ready.popleft()
        if handle.callback is not None:
            handle.context.run(handle.callback, *handle.args)

    def _jump(self, deadline: float) -> None:
        """To the next timer that wasn't cancelled."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not timers or timers[0][0] > deadline:
            raise Deadline
        self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            self._ready.append(heapq.heappop(timers)[2])

    # ------------------------------------------------------------------------------------------- what asyncio calls

    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Handle:
        handle = Handle(0.0, callback, args, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        handle = Handle(when, callback, args, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def run_in_executor(self, executor: None, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """There are no threads: it is done at once."""
        done = self.create_future()
        done.set_result(func(*args))
        return done

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What nobody waits for: a `Process` looks at every task of its own."""
