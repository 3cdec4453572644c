"""Verifier `math_verify`: right if the response's last formula has the value of the expected answer.

Needs the extra `math` (the package math-verify). The library finds formulas in LaTeX (`$…$`; `\\boxed{…}` is preferred)
and plain numbers, reads them with sympy and compares values, so `0.5` equals `\\frac{1}{2}`. The expected answer is
LaTeX with or without `$`.

A short formula may take for ever to compute: `$9^{9^{9^9}}$`. The library's own time-outs are off, since the pool kills
a process that takes too long over a text. Only the end of a response is searched, so that long ones take no longer than
short ones.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import math_verify

NUM_CHARS = 4000
"""Characters at the end of a response that are searched."""

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off


def verify(text: str, answer: str) -> dict[str, float | str | None]:
    """`acc` 1.0 for a right text, 0.0 for a wrong one; `pred`, the formula as written, so that `0.5` and `1/2` are two
    predictions. Raises ValueError for an expected answer without a value."""
    expected = _expected(answer)
    if not expected:
        raise ValueError(f"no formula in the expected answer {answer[:80]!r}")
    given = math_verify.parse(text[-NUM_CHARS:], parsing_timeout=None)  # pyright: ignore[reportArgumentType] (None: no alarm)
    acc = float(math_verify.verify(expected, given, timeout_seconds=None))
    return {"acc": acc, "pred": given[-1] if given else None}  # the library lists possible values first, the text last


@lru_cache(maxsize=1)
def _expected(answer: str) -> list[Any]:
    """Read once for all completions of a prompt."""
    marked = answer if "$" in answer or r"\boxed" in answer else rf"\boxed{{{answer}}}"
    return math_verify.parse(marked, parsing_timeout=None)  # pyright: ignore[reportArgumentType] (None: no alarm)
