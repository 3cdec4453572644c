"""Sums over time, and quantiles of lengths."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.accounting.clock import Level
from asyncdapo.accounting.quantiles import QUANTILES, quantiles


def test_a_level_is_summed_over_the_time_for_which_it_holds() -> None:
    time_s = [10.0]
    level = Level(lambda: time_s[0])
    time_s[0] += 5
    level.set(3)
    time_s[0] += 2
    assert level.total() == 6
    with level.raised():
        time_s[0] += 1
    time_s[0] += 1
    assert level.total() == 6 + 4 + 3


def test_a_level_falls_with_an_error_too() -> None:
    level = Level()
    with pytest.raises(ValueError, match="in it"), level.raised():
        raise ValueError("in it")
    assert level.total() == level.total()


@given(st.lists(st.integers(0, 1000), min_size=1))
def test_a_quantile_is_a_length_that_so_many_do_not_exceed(lengths: list[int]) -> None:
    found = quantiles(lengths)
    assert found["max"] == max(lengths)
    assert found["p10"] <= found["p50"] <= found["p90"] <= found["max"]
    for name, share in QUANTILES.items():
        assert found[name] in lengths
        assert sum(length <= found[name] for length in lengths) >= share * len(lengths)


def test_nothing_has_no_quantiles() -> None:
    assert all(math.isnan(number) for number in quantiles([]).values())
