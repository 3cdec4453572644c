"""A verifier for models of random weights: a verdict that depends on the text and on nothing else, so that groups have
right and wrong answers and train."""

from __future__ import annotations

from zlib import crc32


def coin(text: str, answer: str) -> float:
    return float(crc32(text.encode()) & 1)
