"""Prompts: the seeded stream that everything else counts positions of.

    task (questions) ──▶ PromptStream ──prompt_at(prompt_id)──▶ replay server ──▶ leases

A position is an epoch and a row. Every epoch visits each row once, in an order of its own that follows from the seed:
any position can be asked for at any time, and nothing is ever saved. Rows whose prompt is longer than
`prompts.max_prompt_length` are left out when the stream is opened, and counted. Does not own: what was leased or
trained, which is replay's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from asyncdapo.errors import ConfigError
from asyncdapo.messages import Prompt, sample_seed
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.task import Question, Task

Encode = Callable[[str], list[int]]


class PromptStream:
    """Random access to the prompts of a task. Opening encodes every row of a finite task once.

    `encode` turns a question into the token ids that the model continues. Raises ConfigError when no row fits.
    """

    def __init__(self, config: PromptsConfig, task: Task, encode: Encode, seed: int) -> None:
        self._task = task
        self._encode = encode
        self._seed = seed
        self._max_length = config.max_prompt_length
        self._rows = self._fitting_rows(task.num_rows, task.question_at)
        self._eval_rows = self._fitting_rows(task.num_eval_rows, task.eval_question_at)
        self.num_prompts = len(self._rows) * config.epochs if self._rows is not None and config.epochs else None
        """Positions in all epochs; None is endless."""

    @property
    def num_left_out(self) -> int:
        """Rows, those for evaluation included, whose prompt is too long."""
        tables = ((self._task.num_rows, self._rows), (self._task.num_eval_rows, self._eval_rows))
        return sum(num_rows - len(fitting) for num_rows, fitting in tables if num_rows is not None)

    def prompt_at(self, prompt_id: int) -> Prompt | None:
        """The prompt at this position, the same at every call; None past the end of the data.

        Raises ConfigError when an endless task makes a prompt that is too long.
        """
        if self.num_prompts is not None and prompt_id >= self.num_prompts:
            return None
        epoch, row = 0, prompt_id
        if self._rows is not None:
            epoch, place = divmod(prompt_id, len(self._rows))
            row = self._rows[epoch_order(self._seed, epoch, len(self._rows))[place]]
        return self._prompt(prompt_id, epoch, self._task.question_at(row))

    def eval_prompts(self, num: int) -> list[Prompt]:
        """The first `num` held-out prompts, fewer if the table is shorter. Ids count from 0 in a table of their own."""
        rows = range(num) if self._eval_rows is None else self._eval_rows[:num]
        return [self._prompt(prompt_id, 0, self._task.eval_question_at(row)) for prompt_id, row in enumerate(rows)]

    def _fitting_rows(self, num_rows: int | None, question_at: Callable[[int], Question]) -> list[int] | None:
        if num_rows is None:
            return None
        fitting = [row for row in range(num_rows) if len(self._encode(question_at(row).text)) <= self._max_length]
        if num_rows and not fitting:
            raise ConfigError("prompts.max_prompt_length", f"all {num_rows} prompts are longer", self._max_length)
        return fitting

    def _prompt(self, prompt_id: int, epoch: int, question: Question) -> Prompt:
        token_ids = self._encode(question.text)
        if len(token_ids) > self._max_length:
            problem = f"the task {question.source!r} makes prompts of {len(token_ids)} tokens"
            raise ConfigError("prompts.max_prompt_length", problem, self._max_length)
        return Prompt(
            prompt_id=prompt_id,
            epoch=epoch,
            source=question.source,
            row=question.row,
            token_ids=token_ids,
            answer=question.answer,
        )


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_rows: int) -> Sequence[int]:
    """A permutation of the rows: sorted by a hash of (seed, epoch, row), which no library version can change."""
    return sorted(range(num_rows), key=lambda row: sample_seed(seed, epoch, row))
