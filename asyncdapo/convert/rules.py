"""The parts of a peer's table: rules from their keys to ours, and the results of rules.

A peer is data: its defaults, rules, and the keys without a counterpart, each with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Rank(IntEnum):
    """What a difference changes in training, most consequential first."""

    TASK = 1
    """Data, model, verdict."""
    LOSS = 2
    SAMPLING = 3
    SCHEDULE = 4
    """Learning rate, batches, how long."""
    EVAL = 5
    DETAIL = 6


@dataclass(frozen=True)
class Made:
    """A value of ours with remarks: why it differs from theirs, commands to run first, a note for the top."""

    value: Any
    why: str = ""
    before: tuple[str, ...] = ()
    note: str = ""
    loud: Rank | None = None
    """Set if the difference that `why` describes changes training."""


def plain(made: Any) -> Any:
    """The value without remarks."""
    return made.value if isinstance(made, Made) else made


@dataclass(frozen=True)
class Left:
    """The rule's first key has no counterpart; `why` is the reason."""

    why: str
    always: bool = False
    """List it even if the value is their default."""
    loud: Rank | None = None
    """Set if this changes training: also written at the top and to stderr, and always listed."""


@dataclass(frozen=True)
class Rule:
    """One key of ours, and the function that computes its value from theirs.

    `value` is called with the values of `theirs`, None for each that isn't given. It returns a value, `Made`, `Left`,
    or None if the rule doesn't apply. It may raise ValueError or TypeError for a value that their framework refuses.
    """

    ours: str
    theirs: tuple[str, ...]
    value: Callable[..., Any]


def always(made: dict[str, Any]) -> bool:
    """For a difference that doesn't depend on the lines."""
    return True


@dataclass(frozen=True)
class Differs:
    """A difference of the framework that no key controls."""

    text: str
    rank: Rank | None
    """None: without effect on training."""
    when: Callable[[dict[str, Any]], bool] = always
    """Whether it applies, given the values of the lines by our keys."""


@dataclass(frozen=True)
class Peer:
    """How one framework's keys are converted."""

    title: str
    source: str
    """Repository and commit that the keys are taken from."""
    rules: tuple[Rule, ...]
    defaults: dict[str, Any]
    """Their defaults, as far as a rule turns them into something other than our default."""
    without: tuple[tuple[str, str], ...]
    """(pattern of keys, why they have no counterpart)."""
    differs: tuple[Differs, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    """(beginning of a key in another version, its beginning in the rules)."""
    flags: bool = False
    """Arguments have the form `--key value`, otherwise `key=value`."""
    others: tuple[str, ...] = ()
    """Patterns of `key=value` that show another method of training, which isn't converted."""
    texts: tuple[str, ...] = ()
    """Keys whose value may name a text file; its content is then the value."""


# ----------------------------------------------------------------------------------------------------- making of values


def same(ours: str, theirs: str) -> Rule:
    """The same value under another name; no line if theirs is null."""
    return Rule(ours, (theirs,), lambda value: value)


def text(ours: str, theirs: str) -> Rule:
    """As `same`, for a name or a path; a number becomes text."""
    return Rule(ours, (theirs,), lambda value: None if value in (None, "") else str(value))


def flag(value: Any) -> bool:
    """True or false. Raises ValueError."""
    if isinstance(value, str) and value.lower() in ("1", "yes", "on"):
        return True
    if value in (None, "", 0, False):
        return False
    if value in (1, True):
        return True
    raise ValueError(f"{value!r} is neither true nor false")


def chat_template(files: Any, thinking: Any) -> Made:
    """`thinking`: the argument of the chat template that templates of several families have."""
    return Made(True if thinking is None else {"enable_thinking": flag(thinking)}, "they always use it")


def whole(value: Any) -> int:
    """A whole number. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def number(value: Any) -> float:
    """Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def either(value: Any, table: dict[Any, Any], otherwise: str) -> Any:
    """Our value for theirs, from the table; otherwise `Left`."""
    return table[value] if isinstance(value, str | bool) and value in table else Left(otherwise)
