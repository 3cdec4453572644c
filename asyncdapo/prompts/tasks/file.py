"""Task `file`: the user's own questions and answers, from a JSONL or parquet file.

    {"prompt": "What is 3 + 4?", "answer": 7}       columns: `prompts.prompt_column`, `prompts.answer_column`

The question goes into `prompts.template`, or as it is to the tokenizer's chat template. Evaluation has rows of its own:
those of `prompts.eval_path`, or questions held out of `prompts.path`. A held-out question is never trained on, however
often the file repeats it; which ones are held out depends on the file alone, so that runs can be compared.
"""

from __future__ import annotations

import random
from numbers import Number
from pathlib import Path

from asyncdapo.errors import ConfigError
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.sources import Record, read_records
from asyncdapo.prompts.task import Question

SPLIT_SEED = 0
"""Seed of the choice of held-out questions."""


class FileTask:
    """Questions of a file, in the order of the file. Reads it at once; raises ConfigError."""

    def __init__(self, config: PromptsConfig, num_eval: int) -> None:
        self._config = config
        questions = self._read("prompts.path", config.path)
        if config.eval_path:
            self._questions, self._eval_questions = questions, self._read("prompts.eval_path", config.eval_path)
        else:
            self._questions, self._eval_questions = hold_out(questions, num_eval, config.path)

    @property
    def num_rows(self) -> int:
        return len(self._questions)

    @property
    def num_eval_rows(self) -> int:
        return len(self._eval_questions)

    def question_at(self, row: int) -> Question:
        return self._questions[row]

    def eval_question_at(self, row: int) -> Question:
        return self._eval_questions[row]

    def _read(self, key: str, path: str) -> list[Question]:
        config = self._config
        columns = {"prompts.prompt_column": config.prompt_column, "prompts.answer_column": config.answer_column}
        template = "{prompt}" if config.chat_template else config.template
        records = read_records(key, path, columns)
        return [_question(key, path, row, record, template) for row, record in enumerate(records)]


def _question(key: str, path: str, row: int, record: Record, template: str) -> Question:
    prompt, answer = record.values
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(key, f"the prompt in {record.place} must be text, it is {_shown(prompt)}", path)
    if not isinstance(answer, (str, Number)) or isinstance(answer, bool) or not str(answer).strip():
        raise ConfigError(key, f"the answer in {record.place} must be text or a number, it is {_shown(answer)}", path)
    return Question(text=template.replace("{prompt}", prompt), answer=str(answer), source=Path(path).name, row=row)


def _shown(value: object) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def hold_out(questions: list[Question], num_eval: int, path: str) -> tuple[list[Question], list[Question]]:
    """Split into (for training, held out): `num_eval` distinct questions, every repetition of which leaves training."""
    distinct = {question.text: question for question in questions}
    if num_eval >= len(distinct):
        few = max(1, len(distinct) // 10)
        raise ConfigError(
            "eval.num_prompts, eval.num_greedy_prompts",
            f"{path} has {len(distinct)} distinct questions, so holding out as many leaves nothing to train on",
            num_eval,
            f"eval.num_prompts={few} eval.num_greedy_prompts={few}, or prompts.eval_path=held_out.jsonl",
        )
    held_out = set(random.Random(SPLIT_SEED).sample(list(distinct), num_eval))
    training = [question for question in questions if question.text not in held_out]
    return training, [question for text, question in distinct.items() if text in held_out]
