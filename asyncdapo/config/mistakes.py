"""What a user is told about an unknown key, and about a value of a wrong type or out of range: the right form.

In: sections, as their dataclasses. Out: a section, or ConfigError with the fix. Does not own: which sections there are,
and what values mean.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from asyncdapo.errors import ConfigError

LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
"""Limits of a number by msgspec's names, in words."""

UNSET = re.compile(r"Environment variable '(.*)' not found")


def unknown_key(key: str, sections: Mapping[str, type]) -> ConfigError:
    """The error for `key`, a section or `section.key` that doesn't exist. A key of the same name in another section is
    suggested before one of a similar name."""
    section, _, name = str(key).partition(".")
    keys = {other: [field.name for field in dataclasses.fields(cls)] for other, cls in sections.items()}
    if name in keys.get(section, ()):
        fix = f"that is for the command line; here write `{section}:`, and below it `  {name}: …`"
        return ConfigError(key, "is written with a dot in a file", fix=fix)
    word, names, prefix = (name, keys[section], f"{section}.") if section in keys else (section, list(keys), "")
    meant = [f"{other}.{word}" for other in keys if word in keys[other]]
    meant = meant or [prefix + near for near in difflib.get_close_matches(word, names, n=1, cutoff=0.5)]
    hint = f"did you mean {' or '.join(meant)}?" if meant else f"known here: {', '.join(sorted(names))}"
    return ConfigError(key, "is not a known key", fix=hint)


def unresolved(key: str, problem: str) -> ConfigError:
    """The error for a `${…}` in the value of `key` that can't be resolved. `problem`: in OmegaConf's words."""
    if found := UNSET.search(problem):
        fix = f"export {found[1]}=…, or give a default: ${{oc.env:{found[1]},…}}"
        return ConfigError(key, f"the environment variable {found[1]} is not set", fix=fix)
    return ConfigError(key, problem, fix="`${section.key}` is the value of another key, `${oc.env:NAME}` a variable's")


def convert_section(name: str, cls: type, given: Mapping[str, Any]) -> Any:
    """The section, checked. Raises ConfigError for the first wrong key."""
    for key, value in given.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{name}.{key}", "must be a finite number", number)
    try:
        return msgspec.convert(given, cls)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise _of_another_kind(name, cls, given, str(error)) from None


def _of_another_kind(name: str, cls: type, given: Mapping[str, Any], error: str) -> ConfigError:
    """msgspec's error in our words: key, what is expected, value, fix."""
    problem, _, where = error.partition(" - at `$")
    missing = "missing required field" in problem
    key = problem.split("`")[1] if missing else where.rstrip("`").lstrip(".").split("[")[0]
    hint, limits = get_type_hints(cls)[key], limits_of(get_type_hints(cls, include_extras=True)[key])
    fix = (limits.extra or {}).get("fix", "")
    if missing:
        return ConfigError(f"{name}.{key}", "is missing", fix=fix)
    if "`str` of length" in problem:
        return ConfigError(f"{name}.{key}", "is empty", fix=fix)
    kind = get_args(hint)[0] if get_origin(hint) is tuple and "enum" in problem else hint
    if get_origin(kind) is Literal:
        of = "must be one of" if kind is hint else "each must be one of"
        expected = f"{of} {', '.join(map(str, get_args(kind)))}"
    elif ", got" in problem:
        expected = problem[0].lower() + problem[1:].split(", got")[0]
    else:
        expected = f"must be {' and '.join(f'{LIMITS[limit]} {number:g}' for limit, number in numbers_of(limits))}"
        expected += "".join(
            f" or {word}" for kind in get_args(hint) if get_origin(kind) is Literal for word in get_args(kind)
        )
    default = {field.name: field.default for field in dataclasses.fields(cls)}[key]
    fix = fix or _example(f"{name}.{key}", hint, given[key], default)
    return ConfigError(f"{name}.{key}", f"{expected}, got {given[key]!r}", fix=fix)


def limits_of(hint: Any) -> msgspec.Meta:
    """The limits that a type has, or that the types inside it have."""
    for inner in (*getattr(hint, "__metadata__", ()), *map(limits_of, get_args(hint))):
        if isinstance(inner, msgspec.Meta) and inner != msgspec.Meta():
            return inner
    return msgspec.Meta()


def numbers_of(limits: msgspec.Meta) -> Iterator[tuple[str, float]]:
    """Each limit of a number by its name in LIMITS."""
    for limit in LIMITS:
        if (number := getattr(limits, limit)) is not None:
            yield limit, number


def _example(key: str, hint: Any, value: object, default: object) -> str:
    """How a list or a mapping for this key is written on the command line. Empty for other types."""
    kinds = {get_origin(kind) or kind for kind in (hint, *get_args(hint))}
    if tuple in kinds and isinstance(value, str):
        return f"{key}='[{', '.join(part.strip() for part in value.split(','))}]'"
    if tuple in kinds and isinstance(default, tuple):
        return f"{key}='[{', '.join(map(str, default))}]'"
    if dict in kinds and isinstance(value, list):
        return f"{key}='{{{', '.join(f'{part}: 1' for part in value)}}}'"
    if str in kinds and isinstance(value, dict):
        return f"text in braces stands in quotes: '{{{', '.join(value)}}}'"
    return ""
