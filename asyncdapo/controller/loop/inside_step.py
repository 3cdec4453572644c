"""Inside a step: how far the next batch is filled, and what the reward function raises meanwhile.

In: what the replay server says at every look of the fleet. Out: a line that changes all the time, for a terminal; notes
on groups that failed: the first one at once, then at every doubling of their number, so that a function that raises now
and then is heard of and drowns nothing. Does not own: who waits for whom (`stalls`), when failures end the run
(`replay/server/failures`).
"""

from __future__ import annotations

from asyncdapo.controller.process.health import Filling
from asyncdapo.metrics.reporter import Reporter


class InsideStep:
    """Of one launch."""

    def __init__(self, reporter: Reporter, prompts_per_step: int, total_steps: int) -> None:
        self._reporter, self._prompts_per_step, self._total_steps = reporter, prompts_per_step, total_steps
        self._num_said = 0
        """Failures at the last note, in this life of the replay server."""

    def show(self, filling: Filling) -> None:
        """One look at the replay server."""
        groups = f"batch {filling.step}: {filling.num_ready}/{self._prompts_per_step} groups"
        self._reporter.progress(groups if filling.step <= self._total_steps else "")
        if filling.num_failed < self._num_said:  # the server was started again, and counts anew
            self._num_said = 0
        if filling.num_failed and filling.num_failed >= 2 * self._num_said:
            self._num_said = filling.num_failed
            raised = f"reward warning: the reward function raised on {filling.num_failed:,} groups so far"
            self._reporter.note(f"{raised}, the last: {filling.last_failure}")
