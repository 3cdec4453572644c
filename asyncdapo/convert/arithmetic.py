"""`$((…))` of a shell: whole numbers with + - * / % and brackets, division towards zero."""

from __future__ import annotations

import re
from collections.abc import Callable

Lookup = Callable[[str], str]
"""Name of a variable -> its text. Raises ValueError for an unknown one."""
MAX = 1 << 63


def arithmetic(text: str, value_of: Lookup) -> int:
    """The value of an expression. Raises ValueError, ZeroDivisionError or RecursionError if it can't be computed."""
    value, rest = _sum(re.findall(r"\d+|\$?\{?[A-Za-z_][A-Za-z0-9_]*\}?|\S", text), value_of)
    if rest:
        raise ValueError(f"{rest[0]} is unexpected")
    if abs(value) >= MAX:
        raise ValueError("it is too large")
    return value


def _sum(tokens: list[str], value_of: Lookup) -> tuple[int, list[str]]:
    value, tokens = _product(tokens, value_of)
    while tokens[:1] in (["+"], ["-"]):
        sign = 1 if tokens[0] == "+" else -1
        other, tokens = _product(tokens[1:], value_of)
        value += sign * other
    return value, tokens


def _product(tokens: list[str], value_of: Lookup) -> tuple[int, list[str]]:
    value, tokens = _factor(tokens, value_of)
    while tokens[:1] in (["*"], ["/"], ["%"]):
        operator = tokens[0]
        other, tokens = _factor(tokens[1:], value_of)
        towards_zero = 0 if operator == "*" else abs(value) // abs(other) * (1 if (value < 0) == (other < 0) else -1)
        value = {"*": value * other, "/": towards_zero, "%": value - towards_zero * other}[operator]
        if abs(value) >= MAX:
            raise ValueError("it is too large")
    return value, tokens


def _factor(tokens: list[str], value_of: Lookup) -> tuple[int, list[str]]:
    if not tokens:
        raise ValueError("it ends early")
    first, rest = tokens[0], tokens[1:]
    if first in "+-":
        value, rest = _factor(rest, value_of)
        return (-value if first == "-" else value), rest
    if first == "(":
        value, rest = _sum(rest, value_of)
        if rest[:1] != [")"]:
            raise ValueError("a bracket isn't closed")
        return value, rest[1:]
    if not re.fullmatch(r"[0-9]+", first):
        text = value_of(first.strip("${}")).strip()
        if not re.fullmatch(r"-?\d{1,19}", text):
            raise ValueError(f"{first} is {text[:40]!r}")
        return int(text), rest
    return int(first[:20]), rest
