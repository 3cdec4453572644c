"""The metrics line of each train step: clocks and rates added, written when it is complete.

In: what learner, replay server and publishing report of a step. Out: lines and their alarms, through the reporter. A
line that may turn out to be the run's last is held back until that is known, since the final evaluation belongs into
it. Clocks continue where the launch before was stopped. Does not own: files and terminal (`reporter`), what the
numbers mean (docs/metrics.md), which of them alarm (`alarms`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from asyncdapo.accounting.clock import StateClock
from asyncdapo.accounting.spans import Span, SpanRing
from asyncdapo.metrics.alarms import Alarms
from asyncdapo.metrics.reporter import Reporter
from asyncdapo.metrics.verdict.advice import Keys
from asyncdapo.metrics.verdict.running_verdict import RunningVerdict

COUNTERS = {
    "gen_batches": "filter/gen_batches",
    "prompts_consumed": "filter/prompts_consumed",
    "train_steps": "replay/train_steps",
}
"""What a run has used up so far, as its checkpoints call it and as its lines do."""


class StepMetrics:
    """The lines of one launch."""

    def __init__(
        self,
        reporter: Reporter,
        first_line: Mapping[str, float],
        last_line: Mapping[str, float],
        started: float,
        keys: Keys,
    ) -> None:
        """`first_line`, `last_line`: of the first train step and of the launch before; empty for a new run. `started`:
        when this launch was, `time.monotonic`. `keys`: those that a verdict may advise to change."""
        self._reporter, self._started = reporter, started
        self._alarms = Alarms(first_line, last_line)
        self._verdict = RunningVerdict(keys)
        self._wall_before = last_line.get("time/wall_s", 0.0)
        self._total_before = last_line.get("time/total_s", 0.0)
        self._began: float | None = None
        self._line_at = started
        self._wall_of = {int(last_line.get("step", 0)): self._wall_before}
        """Training time up to each line."""
        self._held: dict[str, float] = {}
        self.last = dict(last_line)
        """The newest line that is written."""
        self.clock = StateClock()
        """What the controller does."""
        self.steps = SpanRing()
        """Train steps, from line to line."""

    def begin(self) -> None:
        """Leases are granted from now on: for the first time in this launch, or again after a learner's death."""
        self._line_at = time.monotonic()
        self._began = self._began or self._line_at
        self.clock.take()  # of a step that is undone
        self._verdict.begin()

    def log_first(self, evaluated: Mapping[str, float]) -> None:
        """Write the line of step 0."""
        self._held = {"step": 0, "time/wall_s": 0.0, "time/total_s": self._total_s(), **evaluated}
        self.write()

    def hold(self, step: int, learner: Mapping[str, float], replay: Mapping[str, float], **others: float) -> None:
        """Keep the line of a step until `write`."""
        self._held = {"step": step, **self._times(step, learner, replay), **replay, **learner, **others}
        verdict, news = self._verdict.add(self._held)
        self._held |= verdict
        for note in (*self._alarms.check(self._held), *news):
            self._reporter.note(note)

    def write(self) -> None:
        """Write the line that is held, if there is one."""
        if self._held:
            self._reporter.log(self._held)
            self.last, self._held = self._held, {}

    def write_last(self, evaluated: Mapping[str, float]) -> None:
        """Write the line of the run's last step with the final evaluation, which is added to one written before."""
        final = {**evaluated, "time/total_s": self._total_s()}
        if self._held:
            self._held |= final
            self.write()
        else:
            self._reporter.amend(final)

    def wall_of(self, step: int) -> float:
        """Training time up to the end of a step, as its line has it."""
        return self._wall_of[step]

    def wall_at(self, now: float) -> float:
        """Training time up to a moment (`time.monotonic`) between `begin` and the end of training."""
        assert self._began is not None, "`begin` comes first"
        return self._wall_before + now - self._began

    def _total_s(self) -> float:
        return self._total_before + time.monotonic() - self._started

    def _times(self, step: int, learner: Mapping[str, float], replay: Mapping[str, float]) -> dict[str, float]:
        """Clocks, and what each side did in the wall time since the last line."""
        now = time.monotonic()
        self.steps.add(Span(f"step {step}", self._line_at, now))
        step_s, self._line_at = now - self._line_at, now
        times = self.clock.take()
        wall_s = self._wall_of[step] = self.wall_at(now)
        return {
            "time/wall_s": wall_s,
            "time/total_s": self._total_s(),
            "time/step_s": step_s,
            "rollout/tokens_per_s": replay["rollout/arrived_tokens"] / step_s,
            "learner/tokens_per_s": learner["learner/tokens"] / step_s,
            "learner/waiting_ratio": times["wait"] / step_s,
            **{f"controller/{state}_s": seconds for state, seconds in times.items()},
            "controller/undone_s": wall_s - step_s - self._wall_of.get(step - 1, wall_s - step_s),
        }


def counters_of(replay: Mapping[str, float]) -> dict[str, int]:
    """The counters of a checkpoint, from replay's metrics of its step, or from a line. All 0 before the first step."""
    return {name: int(replay.get(metric, 0)) for name, metric in COUNTERS.items()}
