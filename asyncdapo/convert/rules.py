"""From their keys to ours: the table of a peer and what a user gave in, lines of our YAML and what is left over out.

A peer is data: its defaults where they differ from ours, rules, and the keys that have no counterpart with the reason.
Every key that was given ends in a line, or in the list of what is left, never in neither.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from asyncdapo.convert.settings import Setting, Settings
from asyncdapo.errors import UserError

SHORT = reprlib.Repr()
"""Of lists: aliases of YAML make a small file an endless one."""
SHORT.maxlist = SHORT.maxdict = SHORT.maxstring = SHORT.maxother = 100
SHORT.maxlevel = 3


@dataclass(frozen=True)
class Made:
    """A value of ours that needs a word: why it isn't theirs, commands to run before, a note for the top."""

    value: Any
    why: str = ""
    before: tuple[str, ...] = ()
    note: str = ""


def plain(made: Any) -> Any:
    """The value without its word."""
    return made.value if isinstance(made, Made) else made


@dataclass(frozen=True)
class Left:
    """The rule's first key has no counterpart; the reason."""

    why: str
    always: bool = False
    """Listed even where the value is a default of theirs."""
    loud: bool = False
    """What trains would be something else: said at the top and on stderr as well, and always listed."""


@dataclass(frozen=True)
class Rule:
    """One key of ours, and the function that makes its value of theirs.

    `value` is called with the values of `theirs`, None for one that isn't given, and returns a value, `Made`, `Left`,
    or None where the rule doesn't apply. It may raise ValueError or TypeError for a value that isn't what they take.
    """

    ours: str
    theirs: tuple[str, ...]
    value: Callable[..., Any]


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
    differs: tuple[str, ...]
    """What it does otherwise without any key."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Beginning of a key in another version, and in the rules."""
    flags: bool = False
    """Arguments are `--key value`, else `key=value`."""


@dataclass
class Line:
    """A line of our YAML."""

    ours: str
    value: Any
    theirs: list[str]
    """The keys that it was made of."""
    why: str = ""
    shown: list[str] = field(default_factory=list)
    """`key=value` of those that the user gave, or that decide the value."""


@dataclass
class Converted:
    """All that is to be written."""

    lines: list[Line] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    """`key=value`, and why it has no line."""
    before: list[str] = field(default_factory=list)
    """Commands to run first."""
    notes: list[str] = field(default_factory=list)
    """Said at the top."""
    loud: list[str] = field(default_factory=list)
    """Said at the top and on stderr."""


def convert(peer: Peer, settings: Settings, defaults: dict[str, Any]) -> Converted:
    """Apply every rule. `defaults` are ours, by dotted key: a line that nobody asked for and that says the same is left
    out."""
    given, names = _canonical(peer, settings)
    known = {key: Setting(value, inherited=f"{peer.title}'s default") for key, value in peer.defaults.items()} | given
    asked = {key for key, setting in given.items() if not setting.inherited}
    made = Converted()
    settled: set[str] = set()
    reasons: dict[str, str] = {}
    always: set[str] = set()
    for rule in peer.rules:
        keys = [key for key in dict.fromkeys(rule.theirs) if key in known]
        if (rule.theirs and not keys) or any(line.ours == rule.ours for line in made.lines):
            continue
        result = _apply(rule, known, names)
        if isinstance(result, Left):
            key = rule.theirs[0]
            reasons.setdefault(key, result.why)
            if (result.always or result.loud) and key in known:
                always.add(key)
            if result.loud:
                made.loud.append(f"{_shown(names.get(key, key), known[key])}: {result.why}")
        elif result is not None:
            result = result if isinstance(result, Made) else Made(result)
            deciding = _deciding(rule, keys, known, asked, result.value)
            if not asked & set(keys) and rule.ours in defaults and defaults[rule.ours] == result.value:
                continue
            settled |= set(deciding)
            made.lines.append(Line(rule.ours, result.value, keys, result.why, deciding))
            made.before += [command for command in result.before if command not in made.before]
            made.notes += [result.note] if result.note and result.note not in made.notes else []
    for line in made.lines:
        beside = [key for key in line.theirs if key in asked - settled]  # given, and without effect beside the others
        settled |= set(beside)
        line.shown = [_shown(names.get(key, key), known[key]) for key in line.theirs if key in (*line.shown, *beside)]
    read = {key for rule in peer.rules for key in rule.theirs}
    for key in sorted(asked - settled | (asked & set(reasons)) | always):
        why = reasons.get(key) or next((why for pattern, why in peer.without if fnmatchcase(key, pattern)), "")
        why = why or (
            "does nothing beside the other values" if key in read else f"unknown: no key of {peer.title} here"
        )
        made.left.append((_shown(names.get(key, key), known[key]), why))
    return made


def _canonical(peer: Peer, settings: Settings) -> tuple[dict[str, Setting], dict[str, str]]:
    """The settings under the names that the rules use, and by them the names that the user used."""
    table: dict[str, Setting] = {}
    names: dict[str, str] = {}
    for name, setting in settings.table.items():
        key = name
        for old, new in peer.aliases:
            if key == old or (old.endswith(".") and key.startswith(old)):
                key = new + key.removeprefix(old)
                break
        if key in table and not table[key].inherited and not setting.inherited:
            other = f"the same as {name} in another version, which is given, too, and taken"
            settings.warnings.append(f"{_shown(names[key], table[key])}: {other}")
        table[key], names[key] = setting, name
    return table, names


def _apply(rule: Rule, known: dict[str, Setting], names: dict[str, str]) -> Any:
    for key in rule.theirs:
        if key in known and known[key].unknown:
            whose = "its" if key == rule.theirs[0] else f"{names.get(key, key)}'s"
            return Left(f"{whose} value isn't known: {known[key].unknown}")
    values = [known[key].value if key in known else None for key in rule.theirs]
    try:
        return rule.value(*values)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        shown = ", ".join(_shown(names.get(key, key), known[key]) for key in rule.theirs if key in known)
        raise UserError(f"{shown}: makes no {rule.ours} ({error})") from error


def _deciding(rule: Rule, keys: list[str], known: dict[str, Setting], asked: set[str], made: Any) -> list[str]:
    """Of the keys that a rule looked at, those to name beside its line: its own, if it was given, and every one with
    which the line changes; all where none is so."""
    own = [key for key in keys if key == rule.theirs[0] and key in asked]
    deciding = [
        key for key in keys if key in own or any(_changes(rule, key, known, made, to) for to in _others(known, key))
    ]
    return deciding or keys


def _changes(rule: Rule, key: str, known: dict[str, Setting], made: Any, to: Any) -> bool:
    values = [to if name == key else known[name].value if name in known else None for name in rule.theirs]
    try:
        return plain(rule.value(*values)) != made
    except (ValueError, TypeError, AttributeError, ArithmeticError):
        return True


def _others(known: dict[str, Setting], key: str) -> tuple[Any, ...]:
    """Other values that a key could have."""
    value = known[key].value
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int | float):
        return (2 * value, value / 2 if value % 2 else value // 2) if value else (1,)
    return () if value is None else ("another",)


def _shown(name: str, setting: Setting) -> str:
    value = " ".join((SHORT.repr if isinstance(setting.value, list | dict) else str)(setting.value).split())
    value = value if len(value) <= 100 else f"{value[:97]}..."
    return f"{name}={value}" + (f" ({setting.inherited})" if setting.inherited else "")


# ----------------------------------------------------------------------------------------------------- making of values


def same(ours: str, theirs: str) -> Rule:
    """The same value under another name; nothing where theirs is null."""
    return Rule(ours, (theirs,), lambda value: value)


def text(ours: str, theirs: str) -> Rule:
    """As `same`, of a name or a path, which a number may be too."""
    return Rule(ours, (theirs,), lambda value: value if value is None else str(value))


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
