"""Shape: which columns hold question and answer, and how they are read.

In: names of columns, the user's choices, records. Out: `Item`s, or a ValueError that says why a record can't be used. A
question is text or messages ([system], user). An answer is a column, or inside an object, such as verl's
`reward_model.ground_truth`. Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Number

from asyncdapo.errors import UserError
from asyncdapo.prompts.sources import ANSWER_COLUMNS, MISSING, PROMPT_COLUMNS, first_of, likely_column, value_at
from asyncdapo.prompts.tasks.file import is_unicode, shown

SOURCE_COLUMNS = ("data_source", "source")
NUMBER = re.compile(r"[-+]?[0-9][0-9,]*(\.[0-9]+)?|[-+]?\.[0-9]+")


@dataclass(frozen=True, slots=True)
class Item:
    """The question and the answer of a record."""

    prompt: str
    answer: str
    source: str
    system: str | None
    from_messages: bool
    """A prompt from messages contains its instruction; a bare question doesn't."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Columns by their dotted names."""

    prompt: str
    answer: str
    source: str | None
    answer_after: str | None = None

    def read(self, record: Mapping[str, object], name: str) -> Item:
        """`name` is the source of a record that doesn't name its own. Raises ValueError."""
        text, system, from_messages = _question(self.prompt, value_at(record, self.prompt))
        answer = _answer(self.answer, value_at(record, self.answer))
        source = value_at(record, self.source) if self.source else None
        source = source if isinstance(source, str) and source and is_unicode(source) else name
        answer = _number_after(self.answer_after, answer) if self.answer_after else answer
        return Item(text, answer, source, system, from_messages)


def recognise(
    columns: Sequence[str], prompt: str | None, answer: str | None, answer_after: str | None, where: str
) -> Shape:
    """The shape of rows with these columns; `prompt` and `answer` are columns that the user named. Raises UserError."""
    return Shape(
        prompt=_column("--prompt-column", columns, prompt, PROMPT_COLUMNS, where),
        answer=_column("--answer-column", columns, answer, ANSWER_COLUMNS, where),
        source=first_of(columns, SOURCE_COLUMNS),
        answer_after=answer_after,
    )


def _column(option: str, columns: Sequence[str], named: str | None, usual: Sequence[str], where: str) -> str:
    there = ", ".join(columns) or "none"
    if named is not None:
        if named in columns:
            return named
        likely = likely_column(named, columns, usual)
        fix = f" (did you mean {likely}?)" if likely else ""
        raise UserError(f"{option} {named}: no such column in {where}, which has {there}{fix}")
    found = first_of(columns, usual)
    if found is None:
        what = option.removeprefix("--").partition("-")[0]
        raise UserError(f"{where}: which column is the {what}? It has {there} (name one by {option})")
    return found


# --------------------------------------------------------------------------------------------------------------- values


def _question(column: str, value: object) -> tuple[str, str | None, bool]:
    """Text, system prompt if there is one, and whether it came as messages."""
    _refuse_missing(column, value)
    if isinstance(value, str):
        return _text(f"{column!r}", value), None, False
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise ValueError(f"the prompt {column!r} must be text or messages, it is {shown(value)}")
    roles = [turn.get("role") for turn in value]
    if roles not in (["user"], ["system", "user"]):
        problem = "has several turns" if len(roles) > 1 else "isn't a user's message"
        raise ValueError(f"the prompt {column!r} {problem}: {', '.join(map(str, roles)) or 'none'}")
    contents = [_text(f"{column!r} ({turn['role']})", turn.get("content")) for turn in value]
    return contents[-1], contents[0] if len(contents) == 2 else None, True


def _answer(column: str, value: object) -> str:
    _refuse_missing(column, value)
    if isinstance(value, Number) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"the answer {column!r} isn't a finite number: {value}")
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"the answer {column!r} must be text or a number, it is {shown(value)}")
    if not value.strip():
        raise ValueError(f"the answer {column!r} is empty")
    if not is_unicode(value):
        raise ValueError(f"the answer {column!r} holds half of a surrogate pair")
    return value


def _refuse_missing(column: str, value: object) -> None:
    if value is MISSING:
        raise ValueError(f"has no column {column!r}")
    if value is None:
        raise ValueError(f"{column!r} is null")


def _text(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, it is {shown(value)}")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    if not is_unicode(value):
        raise ValueError(f"{what} holds half of a surrogate pair")
    return value


def _number_after(mark: str, text: str) -> str:
    _, found, number = text.rpartition(mark)
    if not found or not NUMBER.fullmatch(number.strip()):
        raise ValueError(f"the answer has no number after {mark}: {shown(text[-40:])}")
    return number.strip().replace(",", "")
