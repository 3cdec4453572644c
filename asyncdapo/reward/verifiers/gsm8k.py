"""Verifier `gsm8k`: right if the number after the last `####` is the expected one (Cobbe et al., arXiv 2110.14168).

Commas, dollar signs and text after the number do not count, and `72.0` equals `72`. The expected answer is a number, or
a whole solution of the data set, whose number also follows `####`.
"""

from __future__ import annotations

import re
from decimal import Decimal

MARK = "####"
NUMBER = re.compile(r"\s*([-+]?[0-9]*\.?[0-9]+)")


def verify(text: str, answer: str) -> dict[str, float | str | None]:
    """`acc` 1.0 for a right text, 0.0 for a wrong one; `pred`, the number that it answers. Raises ValueError for an
    expected answer without a number."""
    expected = _number(answer.rpartition(MARK)[2])
    if expected is None:
        raise ValueError(f"no number in the expected answer {answer[-80:]!r}")
    _, mark, said = text.rpartition(MARK)
    given = _number(said) if mark else None
    return {"acc": float(given == expected), "pred": None if given is None else _spell(given)}


def _number(text: str) -> Decimal | None:
    found = NUMBER.match(text.replace(",", "").replace("$", ""))
    return Decimal(found[1]) if found else None


def _spell(number: Decimal) -> str:
    """The same text for equal numbers."""
    digits = f"{number:f}"
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return digits if number else "0"
