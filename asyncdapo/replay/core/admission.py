"""Admission: when the next prompt is leased.

In: how many groups are ahead of the learner. Out: yes or no.

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
from dataclasses import dataclass


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
