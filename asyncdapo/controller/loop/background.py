"""Background work: runs beside the train loop. Its metrics stand in the line of the step in which it ended.

In: the steps that are done, and work that ends with metrics (an evaluation, a comparison of log-probs). Out: those
metrics, once. Invariant: an error of the work is raised where the train loop looks for it (`check`, `take`, or whoever
waits for `task`), never lost and never raised elsewhere. Does not own: what the work does, who waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

Work = Callable[[], Coroutine[Any, Any, dict[str, float]]]


class BackgroundWork:
    """One kind of work, at most one piece of it at a time."""

    def __init__(self, every: int, last_step: int) -> None:
        """It is due after each step that `every` divides (0: none), but not after the last."""
        self._every, self._last_step = every, last_step
        self.task: asyncio.Task[dict[str, float]] | None = None
        """What runs, or has ended and wasn't taken."""

    def begin(self, work: Work) -> None:
        """Run `work` from now on. What was begun before has been taken or cancelled."""
        self.task = asyncio.ensure_future(work())

    def after(self, step: int, work: Work) -> dict[str, float]:
        """Begin `work` if it is due and none runs. Returns the metrics of what has ended since the last time."""
        ended = self.take()
        if self._every and step % self._every == 0 and step < self._last_step and self.task is None:
            self.begin(work)
        return ended

    def take(self) -> dict[str, float]:
        """The metrics of work that has ended; before that, and without work, none."""
        if self.task is None or not self.task.done():
            return {}
        ended, self.task = self.task, None
        return ended.result()

    def check(self) -> None:
        """Raises the error with which the work has ended, if it has."""
        if self.task and self.task.done():
            self.task.result()

    async def cancel(self) -> None:
        """End the work. Neither its metrics nor its error count any more."""
        task, self.task = self.task, None
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
