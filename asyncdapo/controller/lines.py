"""The metrics line of each train step: clocks and rates added, written when it is complete.

In: what learner, replay server and publishing report of a step. Out: lines, through the reporter. A line that may turn
out to be the run's last is held back until that is known, since the final evaluation belongs into it. Clocks go on
where a former launch of the run was stopped. Does not own: files and terminal (`reporter`), what the numbers mean
(docs/metrics.md).
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from asyncdapo.metrics.accounting import StateClock
from asyncdapo.metrics.reporter import Reporter

MAX_DROPPED_RATIO = 0.02
"""Share of groups dropped as stale above which a run says so."""


class Lines:
    """The lines of one launch."""

    def __init__(self, reporter: Reporter, last_line: Mapping[str, float], started: float) -> None:
        """`last_line`: of the launch before; empty for a new run. `started`: when this one was, `time.monotonic`."""
        self._reporter, self._started = reporter, started
        self._wall_before = last_line.get("time/wall_s", 0.0)
        self._total_before = last_line.get("time/total_s", 0.0)
        self._began: float | None = None
        self._line_at = started
        self._held: dict[str, float] = {}
        self._alarmed = False
        self.last = dict(last_line)
        """The newest line that is written."""
        self.clock = StateClock(time.monotonic)
        """What the controller does."""

    def begin(self) -> None:
        """Leases are granted from now on: for the first time in this launch, or again after a learner's death."""
        self._line_at = time.monotonic()
        self._began = self._began or self._line_at
        self.clock.take()  # of a step that is undone

    def log_first(self, evaluated: Mapping[str, float]) -> None:
        """Write the line of step 0."""
        self._held = {"step": 0, "time/wall_s": 0.0, "time/total_s": self._total_s(), **evaluated}
        self.write()

    def hold(self, step: int, learner: Mapping[str, float], replay: Mapping[str, float], **others: float) -> None:
        """Keep the line of a step until `write`."""
        self._alarm_about_drops(replay["replay/dropped_ratio"])
        self._held = {"step": step, **self._times(learner, replay), **replay, **learner, **others}

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

    def _total_s(self) -> float:
        return self._total_before + time.monotonic() - self._started

    def _times(self, learner: Mapping[str, float], replay: Mapping[str, float]) -> dict[str, float]:
        """Clocks, and what each side did in the wall time since the last line."""
        now = time.monotonic()
        step_s, self._line_at = now - self._line_at, now
        times = self.clock.take()
        return {
            "time/wall_s": self._wall_before + now - self._began,
            "time/total_s": self._total_s(),
            "time/step_s": step_s,
            "rollout/tokens_per_s": replay["rollout/arrived_tokens"] / step_s,
            "learner/tokens_per_s": learner["learner/tokens"] / step_s,
            "learner/waiting_ratio": times["wait"] / step_s,
            **{f"controller/{state}_s": seconds for state, seconds in times.items()},
        }

    def _alarm_about_drops(self, dropped_ratio: float) -> None:
        """Say it when many groups are dropped for their age: those that take long are the long answers."""
        if dropped_ratio > MAX_DROPPED_RATIO and not self._alarmed:
            self._alarmed = True
            self._reporter.note(
                f"replay warning: {dropped_ratio:.0%} of the groups were dropped as stale, long answers first: "
                "lower replay.run_ahead, raise replay.max_staleness, or set replay.on_stale=wait"
            )
