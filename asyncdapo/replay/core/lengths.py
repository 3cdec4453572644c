"""Lengths: how long the answers to a row of the data were, so that those of the next epoch can be foretold.

In: groups as they arrive, and those of the ledger. Out: tokens to expect of an answer to a prompt, from the latest
group of its row; 0 for a row that was never answered. Only the order of prompts depends on it (`replay.order`).
Memory: a number for each row that was answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from asyncdapo.messages import Group, Prompt

Row = tuple[str, int]
"""Source and row."""


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
