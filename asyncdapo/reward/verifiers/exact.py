"""Verifier `exact`: the whole response is the expected answer. White space around either does not count."""

from __future__ import annotations


def verify(text: str, answer: str) -> float:
    """1.0 for a right text, 0.0 for a wrong one."""
    return float(text.strip() == answer.strip())
