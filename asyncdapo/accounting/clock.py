"""Where the time of a process goes: states that exclude each other and sum to its wall time.

    StateClock     one state at a time, entered by name; for a task, or code in one event loop
    SharedClock    `with clock.on(state)` around whatever is done, in any thread
    Level          a number that changes, such as the slots in use, summed over time

In: what is done now. Out: seconds of each state, since the last `take` or since the start; the newest spans, which are
the same time with its beginnings and ends. A change costs about a microsecond and reads a clock once. Does not own:
what the states of a process are, how seconds and spans travel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from asyncdapo.accounting.spans import Span, SpanRing


class StateClock:
    """Splits the wall time of one process or task into states.

    Pure: the clock is given. The totals sum to the time since the first `enter`, what one `take` returns to the time
    since the `take` before. Time before the first `enter` belongs to no state and isn't counted. Spans follow each
    other without gaps.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now` gives seconds and never goes back."""
        self._now = now
        self._state: str | None = None
        self._since_s = self._entered_s = 0.0
        self._taken: dict[str, float] = {}
        self._open: dict[str, float] = {}
        self._spans = SpanRing()

    def enter(self, state: str) -> None:
        """From now on time belongs to `state`. Entering the state one is in changes nothing."""
        self._settle()
        if state != self._state:
            self._end_span()
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

    def take_spans(self) -> list[Span]:
        """What was done when since the `take_spans` before, up to now."""
        self._settle()
        self._end_span()
        return self._spans.take()

    def _end_span(self) -> None:
        if self._state is not None and self._since_s > self._entered_s:
            self._spans.add(Span(self._state, self._entered_s, self._since_s))
        self._entered_s = self._since_s

    def _settle(self) -> None:
        """Charge the time since the last call to the current state."""
        now_s = self._now()
        if self._state is not None:
            self._open[self._state] = self._open.get(self._state, 0.0) + now_s - self._since_s
        self._since_s = now_s


class SharedClock:
    """The time of one process, in any thread. Nothing is counted before `begin`.

    Bodies may lie inside each other or overlap; time belongs to the body that was begun last and hasn't ended, or to
    the rest. What goes on beside others (weights are sent while the next gradient is computed) has the time that they
    leave. What never costs any, such as the preparation of the next batch during a train step, has no state. A GPU has
    to be done with a body's work before the body ends, if the time is to be that of the work.
    """

    def __init__(
        self, states: Sequence[str], now: Callable[[], float] = time.monotonic, *, rest: str = "other"
    ) -> None:
        """`states`: those of the bodies. `rest`: the state outside of them."""
        self._states, self._rest = (*states, rest), rest
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
    def on(self, state: str, *, beside: bool = False) -> Iterator[None]:
        """The body's time belongs to `state`, unless another body begins in it. `beside`: only while there is no other
        body, whichever began first."""
        assert state in self._states, state
        key = object()
        with self._lock:
            self._open = {key: state} | self._open if beside else self._open | {key: state}
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
        return {state: taken.get(state, 0.0) for state in self._states}

    def totals(self) -> dict[str, float]:
        """Seconds of every state since `begin`."""
        with self._lock:
            totals = self._clock.totals()
        return {state: totals.get(state, 0.0) for state in self._states}

    def take_spans(self) -> list[Span]:
        """What was done when since the `take_spans` before, or since `begin`."""
        with self._lock:
            return self._clock.take_spans()

    def _enter(self) -> None:
        if self._begun:
            self._clock.enter(next(reversed(self._open.values()), self._rest))


class Level:
    """The integral of a number over time: of the slots in use, slot-seconds. 0 until it is set."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._level, self._since_s, self._sum = 0.0, now(), 0.0

    def set(self, level: float) -> None:
        """From now on the number is `level`."""
        now_s = self._now()
        self._sum += self._level * (now_s - self._since_s)
        self._level, self._since_s = level, now_s

    @contextmanager
    def raised(self) -> Iterator[None]:
        """It is higher by 1 in the body."""
        self.set(self._level + 1)
        try:
            yield
        finally:
            self.set(self._level - 1)

    def total(self) -> float:
        """The integral so far, in seconds times the number's unit."""
        self.set(self._level)
        return self._sum
