"""What the table of a peer is made of: rules from their keys to ours, and their answers.

A peer is data: its defaults where they differ from ours, rules, and the keys that have no counterpart with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Rank(IntEnum):
    """What a difference changes of a training, most consequential first."""

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
    """A value of ours that needs a word: why it isn't theirs, commands to run before, a note for the top."""

    value: Any
    why: str = ""
    before: tuple[str, ...] = ()
    note: str = ""
    loud: Rank | None = None
    """What is said in `why` trains something else."""


def plain(made: Any) -> Any:
    """The value without its word."""
    return made.value if isinstance(made, Made) else made


@dataclass(frozen=True)
class Left:
    """The rule's first key has no counterpart; the reason."""

    why: str
    always: bool = False
    """Listed even where the value is a default of theirs."""
    loud: Rank | None = None
    """What trains is something else: said at the top and on stderr as well, and always listed."""


@dataclass(frozen=True)
class Rule:
    """One key of ours, and the function that makes its value of theirs.

    `value` is called with the values of `theirs`, None for one that isn't given, and returns a value, `Made`, `Left`,
    or None where the rule doesn't apply. It may raise ValueError or TypeError for a value that isn't what they take.
    """

    ours: str
    theirs: tuple[str, ...]
    value: Callable[..., Any]


def always(made: dict[str, Any]) -> bool:
    """Whatever the lines."""
    return True


@dataclass(frozen=True)
class Differs:
    """What a framework does otherwise without any key."""

    text: str
    rank: Rank | None
    """None where it trains the same."""
    when: Callable[[dict[str, Any]], bool] = always
    """By the values of the lines, under our keys."""


@dataclass(frozen=True)
class Peer:
    """How one framework's keys are converted."""

    title: str
    source: str
    """Repository and commit whose keys these are."""
    rules: tuple[Rule, ...]
    defaults: dict[str, Any]
    """Theirs, where a rule gives something that isn't our default."""
    without: tuple[tuple[str, str], ...]
    """Pattern of keys, and why they have no counterpart."""
    differs: tuple[Differs, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    """Beginning of a key in another version, and in the rules."""
    flags: bool = False
    """Arguments are `--key value`, else `key=value`."""
    others: tuple[str, ...] = ()
    """Patterns of `key=value` that another kind of training is given, and none of the kind that is converted."""
    texts: tuple[str, ...] = ()
    """Keys whose value may name a text file, which stands for what it holds."""


# ----------------------------------------------------------------------------------------------------- making of values


def same(ours: str, theirs: str) -> Rule:
    """The same value under another name; nothing where theirs is null."""
    return Rule(ours, (theirs,), lambda value: value)


def text(ours: str, theirs: str) -> Rule:
    """As `same`, of a name or a path, which a number may be too."""
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
    """Ours for theirs by a table, else `Left`."""
    return table[value] if isinstance(value, str | bool) and value in table else Left(otherwise)
