"""Task `file`: the user's own questions and answers, from JSONL or parquet files.

    {"prompt": "What is 3 + 4?", "answer": 7}       columns: `prompts.prompt_column`, `prompts.answer_column`

The question goes into `prompts.template`. An optional column `source` says where a question is from; without it the
source is the file. Evaluation has its own rows: those of `prompts.eval_path`, or questions held out of all training
files together. A held-out question is never trained on, even if the files repeat it. Which questions are held out
depends only on the files, so that runs can be compared.
"""

from __future__ import annotations

import math
import random
import shlex
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from numbers import Number
from pathlib import Path

from asyncdapo.errors import ConfigError
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.sources import LEFT_OUT, Record, read_records
from asyncdapo.prompts.task import Part, Question

SPLIT_SEED = 0
"""Seed of the choice of held-out questions."""
SOURCE_COLUMN = "source"


class FileTask:
    """The questions of data files, in the order of the files, all in memory. Raises ConfigError."""

    def __init__(self, config: PromptsConfig, num_eval: int) -> None:
        self._config = config
        weights = config.weights
        names = short_names(list(weights))
        files = [self._read("prompts.path", path, name) for path, name in zip(weights, names, strict=True)]
        if config.eval_path:
            self._eval_questions = self._read("prompts.eval_path", config.eval_path, Path(config.eval_path).name)
        else:
            files, self._eval_questions = hold_out(files, num_eval, ", ".join(names))
        self._questions = [question for file in files for question in file]
        self.parts = _parts(names, files, list(weights.values()))

    @property
    def num_eval_rows(self) -> int:
        return len(self._eval_questions)

    def question_at(self, row: int) -> Question:
        return self._questions[row]

    def eval_question_at(self, row: int) -> Question:
        return self._eval_questions[row]

    def _read(self, key: str, path: str, name: str) -> list[Question]:
        config = self._config
        columns = {"prompts.prompt_column": config.prompt_column, "prompts.answer_column": config.answer_column}
        records = read_records(key, path, columns, optional=SOURCE_COLUMN)
        return [_question(key, path, name, row, record, config.template) for row, record in enumerate(records)]


def _question(key: str, path: str, name: str, row: int, record: Record, template: str) -> Question:
    prompt, answer = record.values
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        problem, fix = f"the prompt in {record.place} is a list of messages", f"make it text: {as_text(path)}"
        raise ConfigError(key, problem, path, fix)
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(key, f"the prompt in {record.place} must be text, it is {shown(prompt)}", path, LEFT_OUT)
    if not isinstance(answer, (str, Number)) or isinstance(answer, bool) or not str(answer).strip():
        raise ConfigError(
            key, f"the answer in {record.place} must be text or a number, it is {shown(answer)}", path, LEFT_OUT
        )
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ConfigError(key, f"the answer in {record.place} isn't a finite number: {answer}", path, LEFT_OUT)
    for what, text in (("prompt", prompt), ("answer", str(answer))):
        if not is_unicode(text):
            raise ConfigError(key, f"the {what} in {record.place} holds half of a surrogate pair", path, LEFT_OUT)
    said = record.optional
    source = said if isinstance(said, str) and said and is_unicode(said) else name
    return Question(text=template.replace("{prompt}", prompt), answer=str(answer), source=source, row=row)


def as_text(path: str) -> str:
    """The command that turns messages into text, and the key that such data needs."""
    prepare = shlex.join(["asyncdapo", "data", "prepare", path, "--out", f"data/{Path(path).stem}"])
    return f"`{prepare}`, whose keys go with prompts.chat_template=true"


def shown(value: object) -> str:
    """A value for an error message: on one line, shortened."""
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_unicode(text: str) -> bool:
    """False for a lone surrogate: JSON can spell one, but neither a file nor a tokenizer can hold it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that still tell the files apart."""
    for length in range(1, max((len(Path(path).parts) for path in paths), default=1)):
        names = ["/".join(Path(path).parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def hold_out(files: list[list[Question]], num_eval: int, names: str) -> tuple[list[list[Question]], list[Question]]:
    """Split into (training, held out): `num_eval` distinct questions of all files together are held out, and every
    repetition of them leaves training."""
    distinct = {question.text: question for file in files for question in file}
    if num_eval >= len(distinct):
        few = max(1, len(distinct) // 10)
        raise ConfigError(
            "eval.num_prompts, eval.num_greedy_prompts",
            f"{names} has {len(distinct)} distinct questions: holding out that many leaves nothing to train on",
            num_eval,
            f"eval.num_prompts={few} eval.num_greedy_prompts={few}, or prompts.eval_path=held_out.jsonl",
        )
    held_out = set(random.Random(SPLIT_SEED).sample(list(distinct), num_eval))
    training = [[question for question in file if question.text not in held_out] for file in files]
    return training, [question for text, question in distinct.items() if text in held_out]


def _parts(names: Sequence[str], files: Sequence[Sequence[Question]], weights: Sequence[Fraction]) -> list[Part]:
    """Raises ConfigError if a file has no question left."""
    ends = list(accumulate(map(len, files)))
    parts = []
    for name, questions, end, weight in zip(names, files, ends, weights, strict=True):
        if not questions:
            fix = "remove it from the mixture, or give prompts.eval_path"
            raise ConfigError("prompts.path", f"every question of {name} is held out for evaluation", name, fix)
        parts.append(Part(name=name, rows=range(end - len(questions), end), weight=weight))
    return parts
