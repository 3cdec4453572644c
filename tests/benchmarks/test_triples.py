"""When an arm reached its accuracy, and the table of all arms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.triples import TARGET, Row, reached, table

CURVES = st.lists(st.tuples(st.floats(0.1, 9), st.floats(0, 1)), min_size=1, max_size=20)


def row(arm: str, seed: int, to_90_s: float | None, interpolated_s: float | None, last_s: float = 60.0) -> Row:
    times = {"to_90_s": to_90_s, "interpolated_s": interpolated_s}
    return {"arm": arm, "seed": seed, "clocks_s": [0.0, last_s], **times}


def test_the_first_crossing_counts_and_what_comes_behind_it_does_not() -> None:
    clocks, accuracies = [0.0, 10.0, 20.0, 30.0, 40.0], [0.4, 0.85, 0.95, 0.8, 0.97]
    assert reached(clocks, accuracies) == {"to_90_s": 20.0, "interpolated_s": 15.0}


@given(curve=CURVES)
def test_interpolation_lies_between_the_first_checkpoint_that_is_good_enough_and_the_one_before(
    curve: list[tuple[float, float]],
) -> None:
    clocks = [sum(step_s for step_s, _ in curve[:at]) for at in range(len(curve))]
    accuracies = [accuracy for _, accuracy in curve]
    times = reached(clocks, accuracies)
    good = [clock for clock, accuracy in zip(clocks, accuracies, strict=True) if accuracy >= TARGET]
    assert times["to_90_s"] == (round(good[0], 1) if good else None)
    if times["interpolated_s"] is not None:
        before = max((clock for clock in clocks if clock < good[0]), default=0.0)
        assert before - 0.05 <= times["interpolated_s"] <= good[0] + 0.05


def test_a_seeds_ratio_is_that_of_its_faster_synchronous_arm() -> None:
    rows = [row("async", 0, 20, 19), row("sync1", 0, 50, 40), row("sync2", 0, 40, 38), row("trl", 0, 100, 95)]
    assert table(rows).splitlines()[2] == "| 0 | 20 (19) | 50 (40) | 40 (38) | 100 (95) | 2 (2) | 5 (5) |"


def test_an_arm_that_never_reached_it_counts_against_us() -> None:
    rows = [
        row("async", 0, 20, 20),
        row("trl", 0, None, None, last_s=90),
        row("async", 1, None, None),
        row("trl", 1, 80, 80),
    ]
    assert table(rows).splitlines()[2:4] == [
        "| 0 | 20 (20) | never | - | 4.5 (4.5) |",
        "| 1 | never | 80 (80) | - | 0 (0) |",
    ]


@pytest.mark.parametrize("missing", ["async", "sync1", "trl"])
def test_a_seed_that_lacks_an_arm_still_shows_the_others(missing: str) -> None:
    whole = [row(arm, 0, time_s, time_s) for arm, time_s in (("async", 20), ("sync1", 30), ("trl", 80))]
    lacking = [row(arm, 1, time_s, time_s) for arm, time_s in (("async", 40), ("sync1", 40), ("trl", 40))]
    lines = table(whole + [one for one in lacking if one["arm"] != missing]).splitlines()
    assert lines[2] == "| 0 | 20 (20) | 30 (30) | 80 (80) | 1.5 (1.5) | 4 (4) |"
    assert lines[3].count("40 (40)") == 2
    assert lines[3].count("1 (1)") == (0 if missing == "async" else 1)
