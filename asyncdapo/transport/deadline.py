"""A deadline: one point in time that all steps of an operation share."""

from __future__ import annotations

import time
from datetime import timedelta

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
