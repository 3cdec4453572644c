"""A series as one line of text."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.metrics.sparkline import BARS, sparkline

NUMBERS = st.lists(st.floats(-1e9, 1e9) | st.just(math.nan), max_size=200)


@given(NUMBERS, st.integers(1, 60))
def test_it_is_as_wide_as_the_series_or_as_there_is_room(numbers: list[float], width: int) -> None:
    line = sparkline(numbers, width)
    assert len(line) == min(width, len(numbers))
    assert set(line) <= {*BARS, " "}


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=50))
def test_a_higher_number_never_has_a_lower_bar(numbers: list[float]) -> None:
    heights = [BARS.index(bar) for bar in sparkline(sorted(numbers), len(numbers))]
    assert heights == sorted(heights)
    if max(numbers) > min(numbers):
        assert (heights[0], heights[-1]) == (0, len(BARS) - 1)


def test_neighbours_share_a_bar_and_a_gap_is_blank() -> None:
    assert sparkline([0, 0, 1, 1], 2) == "▁█"
    assert sparkline([0, math.nan, 1], 3) == "▁ █"
    assert sparkline([3, 3], 9) == "▅▅"
    assert sparkline([], 9) == ""
