"""A sink: one place that shows the metrics of a run besides RUN_DIR/metrics.jsonl, in a thread of its own.

    reporter ── log, show_samples, mark_undone ──▶ queue (bounded) ──▶ thread: open ▸ log … ▸ close ──▶ its library

In: what a run shows, call by call. Out: the same calls, in order, to a sink that is opened in the thread. Invariants:
no call waits for the sink, whatever its library or a server does; a sink that fails, or takes nothing for `MAX_WAITING`
calls, is named once and dropped, and the run and the other sinks continue. Does not own: the record (metrics.jsonl).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from queue import Full, Queue
from threading import Lock, Thread
from typing import Protocol

from asyncdapo.metrics.samples import Sample

MAX_WAITING = 1000
"""Calls, about one a step."""
FINISH_TIMEOUT_S = 60.0
"""For all sinks together."""

logger = logging.getLogger("metrics")


class Sink(Protocol):
    """Shows metrics. Any error of it is reported with its text."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """The metrics of one step, `step` among them; of the same step again when there are more."""

    def show_samples(self, samples: Sequence[Sample]) -> None:
        """Completions of one step to look at, at least one."""

    def mark_undone(self, steps: Sequence[int], undone_by: int) -> None:
        """These steps, in order and at least one, were undone by branch `undone_by`. They are logged anew."""

    def close(self) -> None:
        """Show the rest, and end what was opened."""


class BackgroundSink:
    """The sink that `open_sink` returns, in a thread. It is a Sink whose calls return at once."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self._name, self._open_sink = name, open_sink
        self._calls: Queue[Callable[[Sink], None] | None] = Queue(MAX_WAITING)
        self._dropped, self._dropping = False, Lock()
        self._thread = Thread(target=self._serve, name=f"metrics-{name}", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float]) -> None:
        line = dict(metrics)
        self._put(lambda sink: sink.log(line))

    def show_samples(self, samples: Sequence[Sample]) -> None:
        self._put(lambda sink: sink.show_samples(samples))

    def mark_undone(self, steps: Sequence[int], undone_by: int) -> None:
        self._put(lambda sink: sink.mark_undone(steps, undone_by))

    def close(self) -> None:
        """Have it finish; `wait` waits for that."""
        self._put(None)

    def wait(self, until_s: float) -> None:
        """Wait until it has finished, at most until this time of `time.monotonic`."""
        if not self._dropped:
            self._thread.join(max(0.0, until_s - time.monotonic()))
            if self._thread.is_alive():
                logger.warning("%s hasn't finished after %g s and is left", self._name, FINISH_TIMEOUT_S)

    def _put(self, call: Callable[[Sink], None] | None) -> None:
        if self._dropped:
            return
        try:
            self._calls.put_nowait(call)
        except Full:
            self._drop(f"it has taken nothing for {MAX_WAITING} steps")

    def _serve(self) -> None:
        """The thread's main."""
        try:
            sink = self._open_sink()
            for call in iter(self._calls.get, None):
                call(sink)
            sink.close()
        except Exception as error:  # noqa: BLE001 - any error of a library ends this sink alone, and is told
            self._drop(str(error) or type(error).__name__)

    def _drop(self, why: str) -> None:
        """Said before it is known: who waits for the thread has its words."""
        with self._dropping:
            if not self._dropped:
                logger.warning("%s is dropped, the run continues without it: %s", self._name, " ".join(why.split()))
                self._dropped = True


def close_all(sinks: Sequence[BackgroundSink]) -> None:
    """Have all finish at the same time, and wait for them, at most `FINISH_TIMEOUT_S`."""
    until_s = time.monotonic() + FINISH_TIMEOUT_S
    for sink in sinks:
        sink.close()
    for sink in sinks:
        sink.wait(until_s)
