"""A deadline: one moment for all steps of something that has to be over by then."""

from __future__ import annotations

import time
from datetime import timedelta

TICK_S = 0.001
"""torch counts time in whole milliseconds, rounded down: its own limit may come so much before ours."""


class Deadline:
    """A moment after which something has failed, shared by all its steps."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    def left(self) -> timedelta:
        """Time left, at least a millisecond (torch reads 0 as no limit in places)."""
        return timedelta(seconds=max(self._end_s - time.monotonic(), TICK_S))

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self._end_s - TICK_S
