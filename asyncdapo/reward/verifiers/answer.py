"""Verifier `answer`: right if the text ends with `Answer: X` and X is exactly the expected answer.

X is everything after the last `Answer: `, so nothing may follow it. White space around X and around the expected answer
does not count; anything else does (`6.0` is not `6`).
"""

from __future__ import annotations

MARK = "Answer: "


def verify(text: str, answer: str) -> float:
    """1.0 for a right text, 0.0 for a wrong one."""
    _, mark, given = text.rpartition(MARK)
    return float(bool(mark) and given.strip() == answer.strip())
