"""The thread that trains: one step after the other, the next one begun before it is commanded.

    the loop      train(batch k) ───────────────▶ metrics ── … version k is sent … ── train(batch k + 1) ─▶ …
                       │      batch k + 1 comes                                           │
    the thread         └▶ begin k ─ finish k ─ begin k + 1 ───────────────────────────────└▶ finish k + 1 ─ …

In: a batch when its step is commanded, and the one behind it when it comes. Out: metrics of the step. Once version k
and batch k + 1 are there the next gradient can be computed, which is most of a step. To apply it needs the command,
which comes when nobody needs version k any more. Invariants: steps begin and end in their order, with the same numbers
whether they began early or not; weights change after a command alone. An error of an early beginning is raised by the
command. Does not own: how a batch comes (`batches`), what a step does (`learner`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack

from asyncdapo.learner.batches.prepared import Prepared
from asyncdapo.learner.step.gradient import Note
from asyncdapo.learner.step.learner import Learner
from asyncdapo.shares import Batch

Observe = Callable[[Batch], AbstractContextManager[Note]]
"""Whose body trains on this batch."""


class StepThread:
    """Of one rank. Use it in one event loop."""

    def __init__(self, learner: Learner, thread: ThreadPoolExecutor, observe: Observe) -> None:
        """`thread`: of one worker; what else it does waits for its turn."""
        self._learner, self._thread, self._observe = learner, thread, observe
        self._observed = ExitStack()
        """What lasts from the beginning of a step to its end."""
        self._beginning: asyncio.Task[None] | None = None
        """Begins the step after the one commanded last, when its batch is there."""
        self._begun: Future[tuple[float, float]] | None = None
        """When the beginning of that step began and ended."""
        self._cpu_s = time.process_time()
        """Of this process, when the last step ended."""

    async def train(self, prepared: Prepared, coming: Awaitable[Prepared | None] | None = None) -> dict[str, float]:
        """Train on this batch. `coming`: the next one, to begin with it as soon as it is there; None if it comes to
        nothing. Returns the learner's metrics, with where its time went since the step before."""
        if self._beginning:
            self._beginning.cancel()  # its batch came just now, and it has not begun
        begun, self._begun = self._begun, None
        training = self._thread.submit(self._train, prepared, begun, time.monotonic())
        self._beginning = asyncio.ensure_future(self._begin_next(coming)) if coming else None
        return await asyncio.wrap_future(training)

    async def _begin_next(self, coming: Awaitable[Prepared | None]) -> None:
        if prepared := await coming:
            self._begun = self._thread.submit(self._begin, prepared)

    def _begin(self, prepared: Prepared) -> tuple[float, float]:
        began_s = time.monotonic()
        self._learner.begin(prepared, self._observed.enter_context(self._observe(prepared.batch)))
        return began_s, time.monotonic()

    def _train(
        self, prepared: Prepared, begun: Future[tuple[float, float]] | None, commanded_s: float
    ) -> dict[str, float]:
        began_s, ended_s = begun.result() if begun else self._begin(prepared)  # `begun` came before this: it is over
        metrics = self._learner.finish()
        self._observed.close()
        cpu_before_s, self._cpu_s = self._cpu_s, time.process_time()
        times = {f"learner/time/{state}_s": seconds for state, seconds in self._learner.times.take().items()}
        ahead_s = max(0.0, min(ended_s, commanded_s) - began_s)
        return {**metrics, **times, "learner/ahead_s": ahead_s, "learner/cpu_s": self._cpu_s - cpu_before_s}
