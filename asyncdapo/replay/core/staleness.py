"""The staleness bound: which versions a batch may still train on.

In: a version (of a group, of a running lease, or of a worker's weights) and a train step. Out: yes or no.

One predicate serves every check of the bound, so that the proof is short. A version *fits* batch k if a group with that
`min_version` has a staleness of at most the bound in it (`messages.staleness`). `state.py` asks

    before a lease         does the worker's loaded version fit the next batch?       else the worker gets none
    when a group arrives   does its min_version fit the next batch?                   else it ends `expired`
    after cut k            does everything running, queued or spare fit batch k + 1?  else it ends
    before cut k           (`on_stale: wait, auto`) does everything running fit k + 1? else the cut waits for it
    at the cut             does every member fit this batch?                          else the run ends

The second and third check ensure that every queued group always fits the next batch; the last one verifies it. Time in
the queue counts, since staleness is measured against the batch, not against the arrival.

Does not own: what happens to a group that doesn't fit (`queue.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncdapo.errors import StalenessError
from asyncdapo.messages import staleness

DROPS_ONE_IN = 100
"""Of so many groups `on_stale: auto` may drop one."""


@dataclass(frozen=True)
class StalenessBound:
    """At most `max_staleness` train steps (0 in synchronous training)."""

    max_staleness: int

    def fits(self, version: int, step: int) -> bool:
        """Whether a group of this `min_version` may be trained on in batch `step`."""
        return staleness(step, version) <= self.max_staleness

    def oldest_version(self, step: int) -> int:
        """The lowest version that fits batch `step`; at least 0, the initial model."""
        return max(0, step - 1 - self.max_staleness)

    def check(self, step: int, min_version: int, group_id: int) -> int:
        """Staleness of a member of batch `step`. Raises StalenessError past the bound: such a group is never
        trained."""
        age = staleness(step, min_version)
        if age > self.max_staleness:
            raise StalenessError(
                f"group {group_id} has staleness {age} in batch {step}, the bound is {self.max_staleness}"
            )
        return age


class Patience:
    """How long a due cut waits for the running groups that it would end (`on_stale: auto`).

    With `overdue` of them, it waits

        while  100 × (dropped + overdue) > dropped + overdue + judged    since lengths would be biased
        or     arrived < overdue                                         since it is cheaper than to sample in vain

    All count groups: `dropped` for staleness and `judged` by the filter in the whole run, `arrived` since the learner
    waits for this batch. The slowest groups have the longest answers. Without a share p of the groups, whichever they
    are, the distribution of lengths moves by at most p (Kolmogorov–Smirnov): so the first line bounds the bias. In the
    second each arrival is a group that the learner could have trained on by now, and each overdue one has tokens that
    would be sampled for nothing. To wait until both are equal costs at most twice what the better choice would.
    """

    def __init__(self, dropped: int, judged: int) -> None:
        """So far in the run."""
        self.dropped, self.judged, self.arrived = dropped, judged, 0

    def waits_for(self, overdue: int) -> bool:
        """Whether the cut waits."""
        lost = self.dropped + overdue
        return overdue > 0 and (DROPS_ONE_IN * lost > lost + self.judged or self.arrived < overdue)
