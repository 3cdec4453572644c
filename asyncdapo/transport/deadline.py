"""A deadline: one point in time that all steps of an operation share. And work that nobody has to wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from threading import Thread
from typing import ParamSpec, TypeVar

R = TypeVar("R")
Params = ParamSpec("Params")

TICK_S = 0.001
"""torch rounds timeouts down to whole milliseconds, so its own limit may come this much earlier than ours."""


class Deadline:
    """The time at which an operation has failed."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    def left(self) -> timedelta:
        """Time left, at least a millisecond (torch sometimes takes 0 for no limit)."""
        return timedelta(seconds=max(self._end_s - time.monotonic(), TICK_S))

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self._end_s - TICK_S


def in_thread(work: Callable[Params, R], *args: Params.args, **kwargs: Params.kwargs) -> Future[R]:
    """What `work` returns, or the RuntimeError that it raises. Whoever doesn't wait for it leaves the thread behind."""
    result: Future[R] = Future()

    def run() -> None:
        try:
            result.set_result(work(*args, **kwargs))
        except RuntimeError as error:
            result.set_exception(error.with_traceback(None))

    Thread(target=run, daemon=True).start()
    return result
