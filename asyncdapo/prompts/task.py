"""The seam between a task and the prompt stream: a table of questions for training and one for evaluation.

A task knows nothing of tokens, epochs or order; the stream does. The same row is the same question in every process
and after every restart, so nothing of a task is ever saved. No row of one table is a question of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """The text given to the model, the answer that the verifier expects, and where it comes from."""

    text: str
    answer: str
    source: str
    row: int
    """Its number in the source (a file's record, from 0), which may differ from its row in the task's table."""


class Task(Protocol):
    """Two tables of questions. Implementations: `tasks/chain.py` (endless), `tasks/file.py` (the user's data)."""

    @property
    def num_rows(self) -> int | None:
        """Training questions; None is endless."""

    @property
    def num_eval_rows(self) -> int | None:
        """Held-out questions; None is endless."""

    def question_at(self, row: int) -> Question:
        """Training question `row`, 0 <= row < num_rows."""

    def eval_question_at(self, row: int) -> Question:
        """Held-out question `row`, 0 <= row < num_eval_rows."""
