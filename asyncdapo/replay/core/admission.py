"""Admission: when the next prompt is leased, and which prompt it is.

In: how many groups are ahead of the learner. Out: yes or no, and the next prompt of the stream.

The rule, checked after every event:

    in_training + queued + keep_rate × running  <  (run_ahead + 1) × prompts_per_step

The left side counts the groups ahead of the learner: members of batches that are cut but whose weights aren't published
yet, kept groups, and running ones times the rate at which the filter keeps groups. Each batch ahead costs one step of
staleness. Nothing is evicted to make room; credits are withheld instead.

Lemma (no deadlock). Suppose nothing is in training, nothing runs, and fewer than B = prompts_per_step groups are
queued. Then the left side is queued < B ≤ (run_ahead + 1) × B, and the rule grants a lease, provided that there is a
prompt, and a worker with a credit and a version that fits the next batch. Hence a learner that waits for a batch waits
for something that runs, or the wait has another name: weights, no live worker, or the end of the data.

Does not own: which worker gets the lease (`leases.py`), and how stale a lease may be (`staleness.py`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FIRST = -1
"""Place of prompts that were in flight at a rollback: before all others."""


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


class PromptStream:
    """The prompts that wait for a lease: fresh ones from `num_fresh` on, and those that came back.

    A prompt's place in the stream is its `prompt_id`, so a prompt that came back is before every fresh one. There are
    two exceptions.

    - The prompt of a lost lease goes behind the next `prompts_per_step` fresh ones. If it kills or stalls workers, it
      doesn't hold up the others. Several lost prompts go that far behind each other: prompts that a worker held when it
      died come back apart, so that the one that kills uses up its own attempts and not those of its neighbours.
    - Prompts that were in flight at a rollback go first, so that repeated rollbacks don't postpone long ones for ever.

    At the barrier (no delay) all keep their own place, because there leases are granted in rising `prompt_id`.

    With `expected_tokens` fresh prompts go by windows of `prompts_per_step`, in each of them the one with the longest
    answer first (`replay.order: longest_first`). A window is used up before the next one, so no length is favoured.
    """

    def __init__(
        self,
        num_prompts: int | None,
        delay: int,
        *,
        num_fresh: int = 0,
        places: Mapping[int, int] | None = None,
        expected_tokens: Callable[[int], float] | None = None,
    ) -> None:
        """`num_prompts`: where the stream ends; None if it doesn't. `delay`: fresh prompts that go before the prompt of
        a lost lease. `places`: those of the prompts that came back before. `expected_tokens`: of an answer to a prompt,
        as far as that is known."""
        self.num_prompts = num_prompts
        self.num_fresh = num_fresh
        """The `prompt_id` of the next fresh prompt that is in no window."""
        self._delay, self._expected_tokens = delay, expected_tokens
        waiting = (places or {}).items()
        self._returned = [(place if delay else prompt_id, prompt_id) for prompt_id, place in waiting]
        heapq.heapify(self._returned)
        self._window: list[tuple[float, int]] = []
        """Fresh prompts in the order of their leases: a heap of minus tokens, and `prompt_id`."""
        self._draw_window()

    @property
    def num_taken(self) -> int:
        """Fresh prompts taken so far."""
        return self.num_fresh - len(self._window)

    @property
    def next(self) -> int | None:
        """The prompt to lease next; None if the data is used up."""
        if self._returned and self._returned[0] <= (self.num_taken, self.num_taken):
            return self._returned[0][1]
        if self._window:
            return self._window[0][1]
        if self._has_fresh:
            return self.num_fresh
        return self._returned[0][1] if self._returned else None

    def take(self) -> int:
        """Remove and return `next`."""
        prompt_id = self.next
        assert prompt_id is not None, "the data is used up"
        if self._window and prompt_id == self._window[0][1]:
            heapq.heappop(self._window)
            self._draw_window()
        elif prompt_id == self.num_fresh:
            self.num_fresh += 1
        else:
            heapq.heappop(self._returned)
        return prompt_id

    @property
    def places(self) -> dict[int, int]:
        """Place of each prompt that came back."""
        return {prompt_id: place for place, prompt_id in self._returned}

    def put_back(self, prompt_id: int) -> int:
        """Put it in its own place, ahead of every fresh prompt. Returns the place."""
        return self._put(prompt_id, min(prompt_id, self.num_taken))

    def put_behind(self, prompt_id: int) -> int:
        """Put it behind the next `delay` fresh prompts, and as far behind any other that came back. Without a delay it
        goes to its own place. Returns the place."""
        last = max((place for place, _ in self._returned), default=0)
        return self._put(prompt_id, max(self.num_taken, last) + self._delay if self._delay else prompt_id)

    def _put(self, prompt_id: int, place: int) -> int:
        heapq.heappush(self._returned, (place, prompt_id))
        return place

    @property
    def _has_fresh(self) -> bool:
        return self.num_prompts is None or self.num_fresh < self.num_prompts

    def _draw_window(self) -> None:
        """The next one, once a window is used up."""
        if self._expected_tokens is None or not self._delay:
            return
        while not self._window and self._has_fresh:
            end = self.num_fresh + self._delay
            prompt_ids = range(self.num_fresh, end if self.num_prompts is None else min(end, self.num_prompts))
            self._window = [(-self._expected_tokens(prompt_id), prompt_id) for prompt_id in prompt_ids]
            heapq.heapify(self._window)
            self.num_fresh += len(prompt_ids)
