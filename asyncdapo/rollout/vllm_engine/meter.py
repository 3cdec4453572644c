"""Meter: how much an engine has sampled, and how long it had work.

In: calls when something happens. Out: cumulative counters. Busy is the time in which requests were outstanding and
generation was not paused.
"""

from __future__ import annotations

import time


class Meter:
    """Counts from `start` on."""

    def __init__(self) -> None:
        self.num_tokens = self.num_prefill_tokens = 0
        self._started_s = self._busy_s = 0.0
        self._busy_since: float | None = None

    def start(self) -> None:
        self._started_s = time.monotonic()

    def note(self, *, busy: bool) -> None:
        """From now on the engine is busy, or idle."""
        now = time.monotonic()
        if self._busy_since is not None:
            self._busy_s += now - self._busy_since
        self._busy_since = now if busy else None

    def gauges(self) -> dict[str, float]:
        self.note(busy=self._busy_since is not None)
        return {
            "tokens": self.num_tokens,
            "prefill_tokens": self.num_prefill_tokens,
            "busy_s": self._busy_s,
            "idle_s": time.monotonic() - self._started_s - self._busy_s,
        }
