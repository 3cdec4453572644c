"""Verifier `exact`: the whole response is the expected answer. White space around either does not count."""

from __future__ import annotations


def verify(text: str, answer: str) -> dict[str, float | str | None]:
    """`acc` 1.0 for a right text, 0.0 for a wrong one; `pred`, the text."""
    pred = text.strip()
    return {"acc": float(pred == answer.strip()), "pred": pred}
