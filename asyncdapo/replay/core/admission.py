"""Admission: when the next prompt is leased, and which one it is.

In: how many groups are ahead of the learner. Out: yes or no, and the next prompt of the stream.

The rule, asked again after every event:

    in_training + queued + keep_rate × running  <  (run_ahead + 1) × prompts_per_step

The left side is what is ahead of the learner, in groups: members of batches that are cut but whose weights are not
published yet, kept groups, and running ones at the rate at which the filter keeps them. Staleness is bought with it
one to one. Nothing is evicted to make room; credits are withheld instead.

Lemma (no deadlock). With nothing in training, nothing running and fewer than B = prompts_per_step groups queued the
rule leases, for then the left side is queued < B ≤ (run_ahead + 1) × B; given a prompt, and a worker with a credit
that has loaded a version fit for the next batch. Hence a learner that waits for a batch waits for something that is
running, or the wait has another name: weights, no live worker, or the end of the data.

Does not own: which worker gets the lease, and the staleness that a lease may have (`state.py`, `staleness.py`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

FIRST = -1
"""Place of the prompts that were in flight at a rollback: before all others."""


@dataclass(frozen=True, kw_only=True)
class Admission:
    """The rule. All numbers are in groups."""

    prompts_per_step: int
    run_ahead: float
    """Batches that generation may be ahead of training; 0 is a barrier."""
    max_verdicts: float = math.inf
    """Most verdicts of one train step. Only the barrier needs it: there, what runs at the limit could not stay for the
    next step, whose weights differ."""

    @property
    def capacity(self) -> float:
        """The right side of the rule."""
        return (self.run_ahead + 1) * self.prompts_per_step

    def admits(self, *, in_training: int, queued: int, running: int, keep_rate: float, verdicts: int) -> bool:
        """Whether one more prompt is leased. `verdicts`: those of the current train step; at the barrier those before
        the next prompt, which may have come back after others had theirs."""
        ahead = in_training + queued + keep_rate * running
        return ahead < self.capacity and verdicts + running < self.max_verdicts


class PromptStream:
    """The prompts that wait for a lease: fresh ones from `num_fresh` on, and those that came back.

    A prompt's place in the stream is its `prompt_id`, so one that came back stands before every fresh one. Only the
    prompt of a lost lease goes behind the next `prompts_per_step` fresh ones: if it is what kills workers or makes them
    stall, the others are not held up by it. Of several, each goes as many behind the one before: what a worker held
    together when it died comes back apart, so that the prompt that kills uses up its own attempts and not those of its
    neighbours. And those in flight at a rollback go first, so that long ones are not put off by every rollback anew. At
    the barrier (no delay) all keep their own place, because leases go out there in rising `prompt_id`.
    """

    def __init__(
        self, num_prompts: int | None, delay: int, *, num_fresh: int = 0, places: Mapping[int, int] | None = None
    ) -> None:
        """`num_prompts`: where the stream ends, None if it doesn't; `delay`: fresh prompts that go before the prompt of
        a lost lease; `places`: of the prompts that came back before."""
        self.num_prompts = num_prompts
        self.num_fresh = num_fresh
        """Prompts taken from the stream so far, which is the `prompt_id` of the next fresh one."""
        self._delay = delay
        waiting = (places or {}).items()
        self._returned = [(place if delay else prompt_id, prompt_id) for prompt_id, place in waiting]
        heapq.heapify(self._returned)

    @property
    def next(self) -> int | None:
        """The prompt to lease next; None when the data is used up."""
        if self._returned and self._returned[0] <= (self.num_fresh, self.num_fresh):
            return self._returned[0][1]
        if self.num_prompts is None or self.num_fresh < self.num_prompts:
            return self.num_fresh
        return self._returned[0][1] if self._returned else None

    def take(self) -> int:
        """Remove and return `next`."""
        prompt_id = self.next
        assert prompt_id is not None, "the data is used up"
        if prompt_id == self.num_fresh:
            self.num_fresh += 1
        else:
            heapq.heappop(self._returned)
        return prompt_id

    @property
    def places(self) -> dict[int, int]:
        """Place of every prompt that came back."""
        return {prompt_id: place for place, prompt_id in self._returned}

    def put_back(self, prompt_id: int) -> int:
        """To its own place, ahead of every fresh prompt. Returns the place."""
        return self._put(prompt_id, prompt_id)

    def put_behind(self, prompt_id: int) -> int:
        """Behind the next `delay` fresh prompts, and as many behind any other that is there; to its own place if there
        is no delay. Returns the place."""
        last = max((place for place, _ in self._returned), default=0)
        return self._put(prompt_id, max(self.num_fresh, last) + self._delay if self._delay else prompt_id)

    def _put(self, prompt_id: int, place: int) -> int:
        heapq.heappush(self._returned, (place, prompt_id))
        return place
