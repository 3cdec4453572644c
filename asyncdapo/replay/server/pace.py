"""Pace: how fast each worker samples while it has something to do, and how full its engine is, so that a slow or a full
one is seen beside the others.

In: the gauges of a worker's heartbeats. Out: means over its latest heartbeats, without the time in which it had no
lease; of a worker that has little to do, over more of them. Does not own: why it is slow.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

HEARTBEATS = 10
MOST_HEARTBEATS = 100
"""Of a worker that has worked less than `MIN_WORKING_S` in fewer. Beside a straggler, a fast one mostly waits."""
MIN_WORKING_S = 1.0
"""Less says nothing."""
WITHOUT_LEASE = "lease_time_s"
COUNTERS = ("tokens", "running_s", "waiting_s")


class Pace:
    """Of one session."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, Mapping[str, float]]] = deque(maxlen=MOST_HEARTBEATS)
        """Working seconds so far and the gauges, as of each heartbeat."""

    def note(self, gauges: Mapping[str, float]) -> None:
        """One heartbeat."""
        working_s = sum(
            seconds for name, seconds in gauges.items() if name.endswith("_time_s") and name != WITHOUT_LEASE
        )
        known = {name: gauges.get(name, 0.0) for name in COUNTERS}
        self._latest.append((working_s, known | {"kv_use": gauges.get("kv_use", math.nan)}))
        while len(self._latest) > HEARTBEATS and working_s - self._latest[1][0] >= MIN_WORKING_S:
            self._latest.popleft()

    @property
    def tokens_per_s(self) -> float:
        """NaN while it isn't known, as the others."""
        return self._rise("tokens")

    @property
    def running(self) -> float:
        """Slots in use."""
        return self._rise("running_s")

    @property
    def sequence_tokens_per_s(self) -> float:
        """Of one sequence. It doesn't fall because a worker has few leases, as the tokens of all of them do."""
        return self.tokens_per_s / self.running if self.running > 0 else math.nan

    @property
    def waiting(self) -> float:
        """Sequences without a slot."""
        return self._rise("waiting_s")

    @property
    def kv_use(self) -> float:
        """Share of the KV cache that is in use, of an engine that says it."""
        shares = [gauges["kv_use"] for _, gauges in list(self._latest)[-HEARTBEATS:]]
        return sum(shares) / len(shares) if shares else math.nan

    def _rise(self, counter: str) -> float:
        """In a second of work."""
        if not self._latest:
            return math.nan
        (first_s, first), (last_s, last) = self._latest[0], self._latest[-1]
        return (last[counter] - first[counter]) / (last_s - first_s) if last_s - first_s >= MIN_WORKING_S else math.nan


Of = Callable[[Pace], float]
SPREADS: tuple[tuple[str, str, Callable[..., float], Of], ...] = (
    ("rollout/worker_tokens_per_s_mean", "rollout/worker_tokens_per_s_min", min, lambda pace: pace.tokens_per_s),
    ("rollout/worker_running_mean", "rollout/worker_running_min", min, lambda pace: pace.running),
    ("rollout/worker_waiting_mean", "rollout/worker_waiting_max", max, lambda pace: pace.waiting),
    ("rollout/worker_kv_use_mean", "rollout/worker_kv_use_max", max, lambda pace: pace.kv_use),
)
"""Mean of the workers and the worst of them."""


def relative(paces: Iterable[Pace]) -> list[float]:
    """The speed of each worker's sequences as a share of the mean of all; 1 if it isn't known. So a slow worker gets
    less while leases are scarce, and one that has few isn't given still fewer."""
    speeds = [pace.sequence_tokens_per_s for pace in paces]
    known = [speed for speed in speeds if math.isfinite(speed)]
    mean = sum(known) / len(known) if known else 0.0
    return [speed / mean if math.isfinite(speed) and mean > 0 else 1.0 for speed in speeds]


def spread(paces: Iterable[tuple[int, Pace]]) -> dict[str, float]:
    """Means of the workers, each beside the worst worker's; who samples the slowest. Nothing of what isn't known."""
    return dict(_spread(dict(paces)))


def _spread(paces: Mapping[int, Pace]) -> Iterator[tuple[str, float]]:
    for mean, worst, worst_of, of in SPREADS:
        if known := [number for pace in paces.values() if math.isfinite(number := of(pace))]:
            yield mean, sum(known) / len(known)
            yield worst, worst_of(known)
    speeds = {worker: pace.tokens_per_s for worker, pace in paces.items() if math.isfinite(pace.tokens_per_s)}
    if speeds:
        yield "rollout/slowest_worker", min(speeds, key=lambda worker: speeds[worker])
