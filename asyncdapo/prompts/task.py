"""The interface between a task and the prompt stream: a table of questions for training and one for evaluation.

A task doesn't handle tokens, epochs or order; the stream does. A row is the same question in every process and after
every restart, so a task has no state to save. No question is in both tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """The text given to the model, the answer that the verifier expects, and where it comes from."""

    text: str
    answer: str
    source: str
    row: int
    """Number of the record in its source, from 0. It may differ from the row in the task's table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Training rows that are drawn from together: those of one file of a mixture."""

    name: str
    rows: range
    weight: Fraction


class Task(Protocol):
    """Two tables of questions. Implementations: `tasks/chain.py` (endless), `tasks/product.py`, `tasks/file.py`
    (the user's data)."""

    @property
    def parts(self) -> Sequence[Part] | None:
        """The training rows, each in exactly one part; None: endless."""
        ...

    @property
    def num_eval_rows(self) -> int | None:
        """Number of held-out questions; None: endless."""
        ...

    def question_at(self, row: int) -> Question:
        """The training question of a row."""
        ...

    def eval_question_at(self, row: int) -> Question:
        """Held-out question `row`, 0 <= row < num_eval_rows."""
        ...
