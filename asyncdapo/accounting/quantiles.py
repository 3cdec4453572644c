"""Quantiles of lengths: what a mean hides.

In: whole numbers. Out: the 10 %, 50 % and 90 % quantiles (the number at that place in their order) and the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}


def quantiles(numbers: Iterable[int]) -> dict[str, float]:
    """By the names of `QUANTILES`; NaN of nothing."""
    ordered = sorted(numbers)
    if not ordered:
        return dict.fromkeys(QUANTILES, math.nan)
    return {name: ordered[math.ceil(share * len(ordered)) - 1] for name, share in QUANTILES.items()}
