"""The seam between a task and the prompt stream: a table of questions for training and one for evaluation.

A task doesn't handle tokens, epochs or order; the stream does. A row is the same question in every process and after
every restart, so nothing of a task is saved. No question is in both tables.
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
    """Its number in the source (a file's record, from 0), which may differ from its row in the task's table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Training rows that are drawn from together: those of one file of a mixture."""

    name: str
    rows: range
    weight: Fraction


class Task(Protocol):
    """Two tables of questions. Implementations: `tasks/chain.py` (endless), `tasks/file.py` (the user's data)."""

    @property
    def parts(self) -> Sequence[Part] | None:
        """The training questions, every row in one part; None is endless."""

    @property
    def num_eval_rows(self) -> int | None:
        """Held-out questions; None is endless."""

    def question_at(self, row: int) -> Question:
        """The training question of a row."""

    def eval_question_at(self, row: int) -> Question:
        """Held-out question `row`, 0 <= row < num_eval_rows."""
