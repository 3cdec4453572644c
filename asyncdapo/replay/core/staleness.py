"""The staleness bound: which versions a batch may still train on.

In: a version (of a group, a running lease, or the weights a worker has loaded) and a train step. Out: yes or no.

One predicate serves every place where the bound is kept, so that the proof is short. A version *fits* batch k if a
group with that `min_version` has staleness `(k − 1) − min_version` ≤ bound in it. `state.py` asks

    before a lease      does the worker's loaded version fit the next batch?       else the worker gets none
    when a group comes  does its min_version fit the next batch?                   else it ends `expired`
    after cut k         does everything running, queued or spare fit batch k + 1?  else it is over
    before cut k        (`on_stale: wait`) does everything running fit k + 1?      else the cut waits for it
    at the cut          does every member fit this batch?                          else the run ends

By the second and third line every queued group fits the next batch at all times; the last line checks it. Waiting
time counts, since staleness is measured against the batch and not against the moment of the cut.

Does not own: what becomes of a group that is over (`state.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncdapo.errors import StalenessError


def staleness(step: int, min_version: int) -> int:
    """Staleness in batch `step` of a group whose oldest sampled token is of `min_version`, in train steps."""
    return step - 1 - min_version


@dataclass(frozen=True)
class StalenessBound:
    """At most `max_staleness` train steps (0 in synchronous training)."""

    max_staleness: int

    def fits(self, version: int, step: int) -> bool:
        """Whether a group of this `min_version` may be trained on in batch `step`."""
        return staleness(step, version) <= self.max_staleness

    def oldest_version(self, step: int) -> int:
        """The lowest version that fits batch `step`; 0, the initial model, at least."""
        return max(0, step - 1 - self.max_staleness)

    def check(self, step: int, min_version: int, group_id: int) -> int:
        """Staleness of a member of batch `step`. Raises StalenessError past the bound: it is never trained."""
        age = staleness(step, min_version)
        if age > self.max_staleness:
            raise StalenessError(
                f"group {group_id} has staleness {age} in batch {step}, the bound is {self.max_staleness}"
            )
        return age
