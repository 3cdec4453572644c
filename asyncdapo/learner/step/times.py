"""What the learner does with its wall time: states that exclude each other and sum to it.

In: `with times.on(state)` around whatever is done, in any thread. Out: seconds of each state in `STATES`. Spans may lie
inside each other or overlap (weights go to a worker that came back while the next batch is waited for); time belongs to
the span that was opened last and is still open, or to `other`. What goes on beside all this, such as the preparation of
the next batch during a train step, has no span. Does not own: the device, which has to be done with a span's work
before the span ends, if the time is to be that of the work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STATES = ("wait", "prepare", "first_pass", "gradient", "sum", "optimizer", "publish", "checkpoint", "other")


class StateClock:
    """Splits the wall time of one process or task into states.

    Pure: the clock is given. The totals sum to the time since the first `enter`, what one `take` returns to the time
    since the `take` before. Time before the first `enter` belongs to no state and isn't counted.
    """

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


class Times:
    """The time of one learner process. Nothing is counted before `begin`."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._clock = StateClock(now)
        self._open: dict[object, str] = {}
        self._lock = threading.Lock()
        self._begun = False

    def begin(self) -> None:
        """Time counts from now on. Said again it changes nothing."""
        with self._lock:
            if not self._begun:
                self._begun = True
                self._enter()

    @contextmanager
    def on(self, state: str) -> Iterator[None]:
        """The body's time belongs to `state`, unless another span is opened in it."""
        assert state in STATES, state
        key = object()
        with self._lock:
            self._open[key] = state
            self._enter()
        try:
            yield
        finally:
            with self._lock:
                del self._open[key]
                self._enter()

    def take(self) -> dict[str, float]:
        """Seconds of every state since the `take` before, or since `begin`."""
        with self._lock:
            taken = self._clock.take()
        return {state: taken.get(state, 0.0) for state in STATES}

    def _enter(self) -> None:
        if self._begun:
            self._clock.enter(next(reversed(self._open.values()), "other"))
