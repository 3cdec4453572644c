"""Prompts: the seeded stream. A `prompt_id` is a position in it.

    task (questions) ──▶ PromptStream ──prompt_at(prompt_id)──▶ replay server ──▶ leases

A position stands for a part of the data, an epoch of that part and a row. The weights determine the part (`mixture`).
Each epoch visits every row of its part once, in its own order, which the seed determines. Any position can be computed
at any time; nothing is saved. When the stream is opened, rows whose prompt is longer than `prompts.max_prompt_length`
are left out and counted. Does not own: what was leased or trained (replay).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from asyncdapo.errors import ConfigError
from asyncdapo.messages import Prompt
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.mixture import Mixture
from asyncdapo.prompts.task import Question, Task
from asyncdapo.seeds import sample_seed

Encode = Callable[[str], list[int]]


class PromptStream:
    """Random access to the prompts of a task. Opening it encodes every row of a finite task once.

    `encode` turns a question into token ids for the model. `unknown_id`: the token for text that the tokenizer doesn't
    know. `with_text`: an environment needs the questions as text, too. Raises ConfigError if no row fits.
    """

    def __init__(
        self,
        config: PromptsConfig,
        task: Task,
        encode: Encode,
        seed: int,
        unknown_id: int | None = None,
        *,
        with_text: bool = False,
    ) -> None:
        self._task = task
        self._unknown_id, self._with_text = unknown_id, with_text
        self.num_unknown = 0
        """Rows of a finite task that fit and contain `unknown_id`."""
        self.first_unknown: list[int] = []
        """Token ids of the first such row."""
        self._encode = encode
        self._max_length = config.max_prompt_length
        self._parts: list[EpochOrder] | None = None
        self.num_prompts: int | None = None
        """Positions in all epochs; None: endless."""
        if task.parts is not None:
            rows = [self._fitting_rows(part.rows, task.question_at, part.name) for part in task.parts]
            self._parts = [EpochOrder(fitting, seed, number) for number, fitting in enumerate(rows)]
            self._mixture = Mixture([part.weight for part in task.parts], seed)
            if config.epochs:  # the run ends before any part begins one more epoch
                ends = (self._mixture.position(part, len(rows) * config.epochs) for part, rows in enumerate(rows))
                self.num_prompts = min(ends)
        self._eval_rows: list[int] | None = None
        if task.num_eval_rows is not None:
            held_out = range(task.num_eval_rows)
            self._eval_rows = self._fitting_rows(held_out, task.eval_question_at, "the evaluation")

    @property
    def num_left_out(self) -> int:
        """Rows whose prompt is too long, evaluation rows included."""
        num_rows = sum(len(part.rows) for part in self._task.parts or [])
        return num_rows - (self.num_rows or 0) + self.num_eval_left_out

    @property
    def num_eval_left_out(self) -> int:
        """Evaluation rows whose prompt is too long."""
        num_rows = self._task.num_eval_rows
        return 0 if num_rows is None or self._eval_rows is None else num_rows - len(self._eval_rows)

    @property
    def num_rows(self) -> int | None:
        """Training rows that fit; None: endless."""
        return None if self._parts is None else sum(part.num_rows for part in self._parts)

    def prompt_at(self, prompt_id: int) -> Prompt | None:
        """The prompt at this position, the same at each call; None past the end of the data.

        Raises ConfigError if an endless task makes a prompt that is too long.
        """
        drawn = self._draw(prompt_id)
        return None if drawn is None else self._prompt(prompt_id, *drawn)

    def row_at(self, prompt_id: int) -> tuple[str, int] | None:
        """Source and row of the prompt at this position, without its tokens; None past the end of the data."""
        drawn = self._draw(prompt_id)
        return None if drawn is None else (drawn[1].source, drawn[1].row)

    def _draw(self, prompt_id: int) -> tuple[int, Question] | None:
        """Epoch and question."""
        if self.num_prompts is not None and prompt_id >= self.num_prompts:
            return None
        epoch, row = 0, prompt_id
        if self._parts is not None:
            part, place = self._mixture.draw(prompt_id)
            epoch, row = self._parts[part].draw(place)
        return epoch, self._task.question_at(row)

    def eval_prompts(self, num: int) -> list[Prompt]:
        """The first `num` held-out prompts, or fewer if the table is shorter. Their ids count from 0, separately."""
        rows = range(num) if self._eval_rows is None else self._eval_rows[:num]
        return [self._prompt(prompt_id, 0, self._task.eval_question_at(row)) for prompt_id, row in enumerate(rows)]

    def _fitting_rows(self, rows: range, question_at: Callable[[int], Question], name: str) -> list[int]:
        lengths = [self._length(question_at(row)) for row in rows]
        fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= self._max_length]
        if rows and not fitting:
            shortest = min(lengths)
            problem = (
                f"all {len(rows)} prompts of {name} are longer, template included: the shortest has {shortest} tokens"
            )
            fix = f"prompts.max_prompt_length={shortest}"
            raise ConfigError("prompts.max_prompt_length", problem, self._max_length, fix)
        return fitting

    def _length(self, question: Question) -> int:
        token_ids = self._encode(question.text)
        if self._unknown_id in token_ids and len(token_ids) <= self._max_length:
            self.num_unknown += 1
            self.first_unknown = self.first_unknown or token_ids
        return len(token_ids)

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
            text=question.text if self._with_text else "",
        )


class EpochOrder:
    """The rows of one part, each once per epoch. Caches the order of the two epochs used last."""

    def __init__(self, rows: Iterable[int], seed: int, part: int) -> None:
        self._rows = list(rows)
        self._seed = sample_seed(seed, part) if part else seed
        self._order = lru_cache(maxsize=2)(self._order_of)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def draw(self, place: int) -> tuple[int, int]:
        """Epoch and row of this draw."""
        epoch, rank = divmod(place, len(self._rows))
        return epoch, self._rows[self._order(epoch)[rank]]

    def _order_of(self, epoch: int) -> Sequence[int]:
        """A permutation of the rows, sorted by a hash of (seed, epoch, row): the same with every library version."""
        return sorted(range(len(self._rows)), key=lambda row: sample_seed(self._seed, epoch, row))
