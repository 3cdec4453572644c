"""The stream of prompts that wait for a lease, and what is known of their rows.

In: prompts that are taken and that come back; groups as they arrive, and those of the ledger. Out: the prompt to lease
next; how long the answers to a row were (`replay.order`); which rows are solved (`prompts.retire_above`). Memory: a few
numbers for each row that was answered.

Does not own: when a prompt is leased (`admission.py`), what becomes of it (`lifecycle.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

from asyncdapo.messages import Group, Prompt

FIRST = -1
"""Place of prompts that were in flight at a rollback: before all others."""

Row = tuple[str, int]
"""Source and row."""
NUM_EPOCHS = 2
"""In which a row was solved before it is left out."""


class AnswerLengths:
    """Of every row that was answered."""

    def __init__(self, known: Mapping[Row, float], row_at: Callable[[int], Row | None]) -> None:
        """`known`: mean tokens of a completion, by row. `row_at`: of the prompt at a position of the stream."""
        self._known, self._row_at = dict(known), row_at

    def note(self, prompt: Prompt, group: Group) -> None:
        """A group of this prompt has arrived."""
        self._known[prompt.source, prompt.row] = group.num_sampled_tokens / len(group.completions)

    def expected(self, prompt_id: int) -> float:
        """Mean tokens of a completion."""
        row = self._row_at(prompt_id)
        return self._known.get(row, 0.0) if row else 0.0


class SolvedRows:
    """Rows that are left out since the model has solved them (`prompts.retire_above`; ScaleRL, arXiv 2510.13786).

    A row is retired when its last two prompts, of two epochs, each had more right answers than the share `above`. It
    gets no group any more, so it stays retired, unless a rollback undoes one of the two. Memory: two numbers for each
    row that was answered.
    """

    def __init__(self, above: float, num_rows: int, row_at: Callable[[int], Row | None]) -> None:
        """`num_rows`: of the data. `row_at`: of the prompt at a position of the stream."""
        self.above, self.num_rows, self._row_at = above, num_rows, row_at
        self._latest: dict[Row, dict[int, float]] = {}
        """Share of right answers to the last two prompts of each row."""
        self._retired: set[Row] = set()

    @property
    def num_retired(self) -> int:
        """Rows."""
        return len(self._retired)

    def note(self, prompt_id: int, right: float) -> None:
        """A group of this prompt has arrived, with this share of right answers."""
        row = self._row_at(prompt_id)
        assert row is not None, "it was leased"
        latest = self._latest.setdefault(row, {})
        latest[prompt_id] = right
        while len(latest) > NUM_EPOCHS:
            del latest[min(latest)]
        if len(latest) == NUM_EPOCHS and min(latest.values()) > self.above:
            self._retired.add(row)
        else:
            self._retired.discard(row)

    def retires(self, prompt_id: int) -> bool:
        """Whether the prompt is of such a row."""
        return self._row_at(prompt_id) in self._retired


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
