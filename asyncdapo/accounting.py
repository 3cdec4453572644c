"""Time accounting: splits a process's wall time into named states that exclude each other and sum to it.

In: `enter(state)` whenever what the process does changes. Out: seconds per state. Pure: the clock is given. Invariant:
the totals sum to the time since the first `enter`, the states of one `take` to the time since the `take` before.
"""

from __future__ import annotations

from collections.abc import Callable


class StateClock:
    """One process or task. Time before the first `enter` belongs to no state and isn't counted."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now` gives seconds and never goes back (`time.monotonic`)."""
        self._now = now
        self._state: str | None = None
        self._since_s = 0.0
        self._taken: dict[str, float] = {}
        self._open: dict[str, float] = {}

    def enter(self, state: str) -> None:
        """From now on time belongs to `state`. Entering the state one is in changes nothing."""
        self._settle()
        self._state = state

    def take(self) -> dict[str, float]:
        """Seconds per state since the `take` before (or the first `enter`), every state ever entered among them."""
        self._settle()
        part = {state: self._open.get(state, 0.0) for state in self._taken | self._open}
        self._taken = {state: self._taken.get(state, 0.0) + seconds for state, seconds in part.items()}
        self._open = {}
        return part

    def totals(self) -> dict[str, float]:
        """Seconds per state since the first `enter`."""
        self._settle()
        return {state: self._taken.get(state, 0.0) + self._open.get(state, 0.0) for state in self._taken | self._open}

    def _settle(self) -> None:
        """Charge the time since the last call to the current state."""
        now_s = self._now()
        if self._state is not None:
            self._open[self._state] = self._open.get(self._state, 0.0) + now_s - self._since_s
        self._since_s = now_s
