"""Verifier `answer`: right if the text ends with `Answer: X` and X is exactly the expected answer.

X is everything after the last `Answer: `, so nothing may follow it. White space around X and around the expected answer
does not count; anything else does (`6.0` is not `6`).
"""

from __future__ import annotations

MARK = "Answer: "


def verify(text: str, answer: str) -> dict[str, float | str | None]:
    """`acc` 1.0 for a right text, 0.0 for a wrong one; `pred`, what it answers."""
    _, mark, given = text.rpartition(MARK)
    pred = given.strip() if mark else None
    return {"acc": float(pred == answer.strip()), "pred": pred}
