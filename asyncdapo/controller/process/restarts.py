"""The budget of deaths: how long to wait before a process is started again, and when the run gives up.

In: the death of a process. Out: seconds to wait, or the end of the run with the cause of the last death. Invariant: no
process is started more than `controller.max_restarts` times within `WINDOW_S`, so that one that can't live ends the run
soon, and one that is killed now and then does not, however long the run is. A start waits only while deaths follow each
other within `RECENT_S`. Pure: the clock is given.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

from asyncdapo.errors import RunError

WINDOW_S = 3600.0
RECENT_S = 60.0
FIRST_DELAY_S = 0.5
"""After the second death within `RECENT_S`; it doubles with each further one."""
MAX_DELAY_S = 8.0


class TooManyDeaths(RunError):  # noqa: N818 - what happened to it, not a failure of ours
    """Of one process within an hour."""


class Restarts:
    """Deaths of each process, by its name."""

    def __init__(self, max_restarts: int, now: Callable[[], float]) -> None:
        self._max_restarts, self._now = max_restarts, now
        self._deaths: defaultdict[str, deque[float]] = defaultdict(deque)

    def delay_s(self, name: str, cause: Exception) -> float:
        """Count a death. Returns the seconds to wait before the next start, none if it is the only one of late. Raises
        TooManyDeaths with the cause when the budget is used up."""
        deaths, now = self._deaths[name], self._now()
        while deaths and deaths[0] <= now - WINDOW_S:
            deaths.popleft()
        deaths.append(now)
        if len(deaths) > self._max_restarts:
            raise TooManyDeaths(
                f"{cause} (death number {len(deaths)} within an hour; controller.max_restarts is {self._max_restarts})"
            ) from cause
        num_recent = sum(at > now - RECENT_S for at in deaths)
        return min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** (num_recent - 2)) if num_recent > 1 else 0.0
