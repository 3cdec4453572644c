"""A sparkline: a series as one line of text.

In: numbers, a width. Out: a character for each number, or for each mean of neighbours if there are more than fit. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def sparkline(numbers: Sequence[float], width: int) -> str:
    """At most `width` characters, from the lowest number to the highest; a blank where there is none. If all are alike,
    they stand in the middle."""
    means = [mean(part) for part in parts(numbers, width)]
    known = [mean for mean in means if math.isfinite(mean)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    return "".join(_bar(mean, low, high) for mean in means)


def parts(numbers: Sequence[float], most: int) -> list[Sequence[float]]:
    """Neighbours, in at most so many parts, whose sizes differ by one at most."""
    num_parts = min(most, len(numbers))
    ends = [len(numbers) * part // num_parts for part in range(num_parts + 1)] if num_parts else []
    return [numbers[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]


def mean(numbers: Sequence[float]) -> float:
    """Of those that are known; NaN if none is."""
    known = [number for number in numbers if math.isfinite(number)]
    return sum(known) / len(known) if known else math.nan


def _bar(number: float, low: float, high: float) -> str:
    if not math.isfinite(number):
        return " "
    return BARS[round((number - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[len(BARS) // 2]
