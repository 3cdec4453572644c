"""Pace: how fast each worker samples while it has something to do, so that a slow one is seen beside the others.

In: the gauges of a worker's heartbeats. Out: tokens per second over its latest heartbeats, without the time in which it
had no lease. Does not own: why it is slow.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping

HEARTBEATS = 10
MIN_WORKING_S = 1.0
"""Less says nothing."""
WITHOUT_LEASE = "lease_time_s"


class Pace:
    """Of one session."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float]] = deque(maxlen=HEARTBEATS)
        """Tokens and working seconds so far, as of each heartbeat."""

    def note(self, gauges: Mapping[str, float]) -> None:
        """One heartbeat."""
        working_s = sum(
            seconds for name, seconds in gauges.items() if name.endswith("_time_s") and name != WITHOUT_LEASE
        )
        self._latest.append((gauges.get("tokens", 0.0), working_s))

    @property
    def tokens_per_s(self) -> float:
        """NaN while it isn't known."""
        if not self._latest:
            return math.nan
        (first_tokens, first_s), (tokens, seconds) = self._latest[0], self._latest[-1]
        return (tokens - first_tokens) / (seconds - first_s) if seconds - first_s >= MIN_WORKING_S else math.nan


def spread(paces: Iterable[tuple[int, Pace]]) -> dict[str, float]:
    """The mean of the workers' paces, and the slowest worker with its pace; nothing while none is known."""
    known = {worker: pace.tokens_per_s for worker, pace in paces if math.isfinite(pace.tokens_per_s)}
    if not known:
        return {}
    slowest = min(known, key=lambda worker: known[worker])
    return {
        "rollout/worker_tokens_per_s_mean": sum(known.values()) / len(known),
        "rollout/worker_tokens_per_s_min": known[slowest],
        "rollout/slowest_worker": slowest,
    }
