"""The time of an episode in its environment: what one stretch of it may take, and what all of them together.

In: when the environment begins to work, and when it stops. Out: one call as soon as it is late. The clock stands still
while the model works for the environment. Does not own: what becomes of an environment that is late (`host`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Clock:
    """Use it in one event loop, for one call at a time."""

    def __init__(self, stretch_s: float, total_s: float) -> None:
        """`stretch_s`: most seconds without a stop. `total_s`: most seconds of all calls together."""
        self._stretch_s, self._left_s = stretch_s, total_s
        self._on_late: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._began = 0.0

    def begin(self, on_late: Callable[[], None]) -> None:
        """A call begins. `on_late` is called once its time is over."""
        self._on_late = on_late
        self.go_on()

    def go_on(self) -> None:
        """The environment works. Nothing happens without a call."""
        if self._on_late is not None and self._timer is None:
            loop = asyncio.get_running_loop()
            self._began = loop.time()
            self._timer = loop.call_later(min(self._stretch_s, self._left_s), self._on_late)

    def stand_still(self) -> None:
        """It doesn't."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._left_s = max(self._left_s + self._began - asyncio.get_running_loop().time(), 0.0)

    def end(self) -> None:
        """The call is over."""
        self.stand_still()
        self._on_late = None
