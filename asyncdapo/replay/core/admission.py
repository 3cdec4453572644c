"""Admission: when the next prompt is leased.

In: how many groups are ahead of the learner. Out: yes or no; and `run_ahead`, where it is measured.

The rule, checked after every event:

    in_training + queued + keep_rate × running  <  (run_ahead + 1) × prompts_per_step

The left side counts the groups ahead of the learner: members of batches that are cut but whose weights aren't published
yet, kept groups, and running ones times the rate at which the filter keeps groups. Each batch ahead costs one step of
staleness. Nothing is evicted to make room; credits are withheld instead.

Lemma (no deadlock). Suppose nothing is in training, nothing runs, and fewer than B = prompts_per_step groups are
queued. Then the left side is queued < B ≤ (run_ahead + 1) × B, and the rule grants a lease, provided that there is a
prompt, and a worker with a credit and a version that fits the next batch. Hence a learner that waits for a batch waits
for something that runs, or the wait has another name: weights, no live worker, or the end of the data.

Does not own: which prompt is next (`stream.py`), which worker gets the lease (`leases.py`), and how stale a lease may
be (`staleness.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from asyncdapo.replay.config import ReplayConfig
from asyncdapo.replay.core.events import PaceMeasured

NUM_MEASURED = 12
"""Latest steps by which `run_ahead: auto` goes."""
FIRST_RUN_AHEAD = 2.0
"""What it begins with, or halfway between 1 and the bound where that is less, since groups near the bound are dropped.
It is enough for most loads: a start with too little is waited for in several steps."""
NUM_ENOUGH = 4
"""Steps after which it may be less than what it began with. Fewer of them say too little."""
RESERVE = 1 / 8
"""Batches that it adds to what was needed."""


@dataclass(frozen=True, kw_only=True)
class Admission:
    """The rule. All numbers count groups."""

    prompts_per_step: int
    run_ahead: float
    """How many batches generation may be ahead of training; 0 is a barrier."""
    max_verdicts: float = math.inf
    """Most verdicts of one train step. Only the barrier needs it: groups that still run at the limit could not count
    for the next step, which has other weights."""

    @property
    def capacity(self) -> float:
        """The right side of the rule."""
        return (self.run_ahead + 1) * self.prompts_per_step

    def admits(self, *, in_training: int, queued: int, running: int, keep_rate: float, verdicts: int) -> bool:
        """Whether one more prompt is leased. `verdicts`: those of the current train step. At the barrier: only those of
        prompts before the next one, which may have come back after later ones had their verdict."""
        ahead = in_training + queued + keep_rate * running
        return ahead < self.capacity and verdicts + running < self.max_verdicts


class Pacing:
    """How far ahead generation may be: `replay.run_ahead`, or what was measured (`auto`).

    Measured in every step, in groups, B of them a batch:

        of the workers   most that was ahead, had every free slot got a lease:  max of  ahead + keep_rate × credits
        of the learner   what must be ahead for batch k + 1 to be full when version k is published, and no more is ready
                         than that:  (run_ahead + 1) × B − (ready − B)

    Each is how large the right side of the rule has to be for one side never to wait. It is enough if one of them never
    waits: the other is slower then, and all that is gained by a larger `run_ahead` is staleness. So

        needed    = min(max of the workers' last 12, max of the learner's last 12) / B − 1
        run_ahead = needed + 1/8                                                              within 0 and max_staleness

    The reserve is for the next step, which may need more than the last 12. A batch that lacks one group waits for as
    long as that group's responses take, so the last group costs more time than others, and as little staleness.

    It doesn't oscillate, since what is measured doesn't depend on the value in force: with d fewer groups ahead every
    lease is granted when that of d prompts later would have been, so d fewer are ready. The maxima let it rise at once,
    and fall after 12 steps without need; a step of bad luck costs some staleness, and no waiting later.
    """

    def __init__(self, config: ReplayConfig, measured: Iterable[tuple[float, float]] = ()) -> None:
        """`measured`: what the latest steps said, of the workers and of the learner, oldest first."""
        self._size, self._most = config.prompts_per_step, config.max_staleness
        self._fixed = None if config.run_ahead == "auto" else config.run_ahead
        self._measured = deque(measured, maxlen=NUM_MEASURED)
        self._peak = 0.0
        """Of what the workers could have had ahead, in this step."""

    @property
    def run_ahead(self) -> float:
        """In force."""
        if self._fixed is not None:
            return self._fixed
        least = 0.0 if len(self._measured) >= NUM_ENOUGH else min(FIRST_RUN_AHEAD, (self._most + 1) / 2)
        needed = min(map(max, zip(*self._measured, strict=True)), default=0.0) / self._size - 1
        return min(float(self._most), max(least, needed + RESERVE))

    def note(self, ahead: float) -> None:
        """After an event: what would be ahead if every free slot got a lease."""
        self._peak = max(self._peak, ahead)

    def end_step(self, step: int, ready: int) -> PaceMeasured | None:
        """Its version is published, and `ready` groups are there for the batches after it. None if nothing is
        measured."""
        if self._fixed is not None:
            return None
        of_workers, of_learner = self._peak, (self.run_ahead + 2) * self._size - ready
        self._measured.append((of_workers, of_learner))
        self._peak = 0.0
        return PaceMeasured(step=step, of_workers=of_workers, of_learner=of_learner, run_ahead=self.run_ahead)
