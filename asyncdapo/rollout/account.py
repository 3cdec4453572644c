"""What a worker's time and tokens go into.

    generate      the engine has sequences to sample
    load          it has stopped for new weights
    environment   it has nothing to sample: episodes wait for their environment
    score         it has nothing to sample: groups wait for verdicts
    send          it has nothing to sample: groups wait until the replay server has them
    lease         it has nothing at all: no lease is granted

In: what the worker holds, whenever that changes. Out: counters since the start: seconds of each state, which sum to the
time since then; slots in use and sequences that wait for one, summed over time; tokens that no group or answer brings.
Does not own: what the engine counts.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from asyncdapo.accounting.clock import Level, StateClock
from asyncdapo.accounting.names import WORKER_STATES
from asyncdapo.accounting.spans import Span
from asyncdapo.rollout.engine import Engine
from asyncdapo.rollout.job import Job


class WorkerAccount:
    """The account of one worker, in its event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._clock = StateClock()
        self._clock.enter("lease")
        self._loading = False
        self._running, self._waiting, self._unsent = Level(), Level(), Level()
        self._probe_tokens = self._late_tokens = 0

    def note(self, jobs: Collection[Job], num_unsent: int) -> None:
        """These jobs are under way, and the server hasn't acknowledged so many answers."""
        num_outstanding = self._engine.num_outstanding
        self._clock.enter(self._state(num_outstanding, jobs, num_unsent))
        self._running.set(min(num_outstanding, self._engine.num_slots))
        self._waiting.set(max(0, num_outstanding - self._engine.num_slots))
        self._unsent.set(num_unsent)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """The engine loads weights in the body."""
        self._loading = self._engine.stops_to_load
        if self._loading:
            self._clock.enter("load")
        try:
            yield
        finally:
            self._loading = False

    def count_late(self, job: Job) -> None:
        """The job has ended without an answer: what the server was told of its tokens is what it counts."""
        self._late_tokens += job.num_tokens - job.num_told_tokens

    def count_probe(self, num_tokens: int) -> None:
        """So many tokens were sampled to compare log-probs."""
        self._probe_tokens += num_tokens

    def gauges(self) -> dict[str, float]:
        """Cumulative: `STATE_time_s` of each state; `running_s` of slots in use, `waiting_s` of sequences without a
        slot, `unsent_s` of answers; `cpu_s` of this process; `late_tokens`, `probe_tokens`."""
        seconds = self._clock.totals()
        return {
            **{f"{state}_time_s": seconds.get(state, 0.0) for state in WORKER_STATES},
            "running_s": self._running.total(),
            "waiting_s": self._waiting.total(),
            "unsent_s": self._unsent.total(),
            "cpu_s": time.process_time(),
            "late_tokens": self._late_tokens,
            "probe_tokens": self._probe_tokens,
        }

    def take_spans(self) -> list[Span]:
        """What it did when since the `take_spans` before."""
        return self._clock.take_spans()

    def _state(self, num_outstanding: int, jobs: Collection[Job], num_unsent: int) -> str:
        if self._loading:
            return "load"
        if num_outstanding or any(job.num_starting for job in jobs):
            return "generate"
        if any(job.num_in_environment for job in jobs):
            return "environment"
        if jobs:
            return "score"
        return "send" if num_unsent else "lease"
