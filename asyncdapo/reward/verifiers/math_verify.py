"""Verifier `math_verify`: the response's last formula has the value of the expected answer, says the library.

Needs the extra `math` (the package math-verify): it finds formulas in LaTeX (`$…$`, `\\boxed{…}`, which goes first) and
plain numbers, reads them with sympy and compares values, so `0.5` is `\\frac{1}{2}`. The expected answer is LaTeX with
or without `$`.

Formulas are short programs: `$9^{9^{9^9}}$` takes for ever. The library's own alarms are off, since the pool ends a
process that takes too long over a text. What is looked at is the end of a response, so that a long one takes no longer
than a short one.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import math_verify

NUM_CHARS = 4000
"""Of a response's end."""

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarms are off


def verify(text: str, answer: str) -> dict[str, float | str | None]:
    """`acc` 1.0 for a right text, 0.0 for a wrong one; `pred`, the formula as it is written, so that `0.5` and `1/2`
    are two. Raises ValueError for an expected answer that has no value."""
    expected = _expected(answer)
    if not expected:
        raise ValueError(f"no formula in the expected answer {answer[:80]!r}")
    given = math_verify.parse(text[-NUM_CHARS:], parsing_timeout=None)
    acc = float(math_verify.verify(expected, given, timeout_seconds=None))
    return {"acc": acc, "pred": given[-1] if given else None}  # the library puts the text behind the values it may have


@lru_cache(maxsize=1)
def _expected(answer: str) -> list[Any]:
    """Read once for all completions of a prompt."""
    marked = answer if "$" in answer or r"\boxed" in answer else rf"\boxed{{{answer}}}"
    return math_verify.parse(marked, parsing_timeout=None)
