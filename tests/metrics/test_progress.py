from __future__ import annotations

import math
from datetime import datetime
from io import StringIO

import pytest

from asyncdapo.metrics.progress import ProgressLines
from tests.metrics.accounts_of import lost_to

METRICS = {
    "step": 7,
    "reward/mean": -0.25,
    "eval/accuracy": 0.5,
    "rollout/tokens_per_s": 5123.4,
    "learner/tokens_per_s": 4100,
    "replay/staleness_mean": 1.25,
    "replay/staleness_max": 2,
    "replay/queued": 3,
    **lost_to("rollout", 0.127),
    "time/wall_s": 12.34,
    "time/step_s": 3.456,
}


def noon() -> datetime:
    return datetime(2000, 1, 1, 12, 0, 0)


def lines_of(*steps: dict[str, float], total_steps: int = 36) -> list[str]:
    stream = StringIO()
    lines = ProgressLines(stream, total_steps, noon)
    for metrics in steps:
        lines.log(metrics)
    return stream.getvalue().splitlines()


def test_a_step_is_one_short_line_that_shows_both_sides():
    [line] = lines_of(METRICS)
    assert len(line) <= 120
    assert line == (
        "12:00:00  step  7/36  reward -0.250  tok/s  5,123  /  4,100  stale 1.25  limit  rollout  "
        "accuracy 0.500  left 1:40"
    )


def test_a_line_has_at_most_120_columns_also_with_both_evaluations():
    [line] = lines_of(
        METRICS
        | {"step": 36, "rollout/tokens_per_s": 12938, "learner/tokens_per_s": 10505}
        | lost_to("environment", 0.52)
        | {"eval/greedy_accuracy": 0.5}
    )
    assert line.endswith("accuracy 0.500  greedy 0.500")
    assert len(line) <= 120


@pytest.mark.parametrize(("shares", "said"), [((0.04, 0.02), "none"), ((0.3, 0.28), "unsure"), ((0.3, 0.1), "reward")])
def test_a_line_says_what_limits_the_run(shares: tuple[float, float], said: str):
    first, second = shares
    [line] = lines_of(METRICS | lost_to("reward", first) | {"verdict/rollout_ratio": second})
    assert f"limit {said:>8}  " in line


def test_lines_are_aligned_and_a_number_that_is_none_is_a_dash():
    first, second = lines_of(METRICS, METRICS | {"reward/mean": math.nan})
    assert len(first) == len(second)
    assert "reward      -  tok/s" in second


def test_a_line_leaves_out_what_its_step_has_no_number_for():
    [start] = lines_of({"step": 0, "eval/accuracy": 0.25, "eval/greedy_accuracy": 0.5})
    assert start == "12:00:00  step  0/36  accuracy 0.250  greedy 0.500"


def test_groups_on_which_the_reward_function_raised_stand_in_the_line_of_their_step():
    well, ill = lines_of(METRICS | {"reward/failed_ratio": 0.0}, METRICS | {"reward/failed_ratio": 0.125})
    assert "failed" not in well
    assert "  failed 12%" in ill


def test_the_time_left_is_told_by_the_latest_steps():
    steps = ({"step": 1, "time/step_s": 10.0}, {"step": 2, "time/step_s": 30.0}, {"step": 3}, {"step": 200})
    lines = lines_of({"step": 0}, *steps, total_steps=200)
    left = [line.partition("left ")[2].strip() for line in lines]
    assert left == ["", "33:10", "1:06:00", "1:05:40", ""]


def test_how_far_a_step_is_makes_no_lines():
    stream = StringIO()
    ProgressLines(stream, 36, noon).progress("batch 8: 7/16 groups")
    assert stream.getvalue() == ""


def test_a_status_is_said_once_until_it_changes_or_a_step_is_done():
    stream = StringIO()
    lines = ProgressLines(stream, 36, noon)
    for text in ("waits", "waits", "trains", "waits"):
        lines.status(text)
    lines.log(METRICS)
    lines.status("waits")
    said = [line.split("  ", 1)[1] for line in stream.getvalue().splitlines()]
    assert said[:3] == ["waits", "trains", "waits"]
    assert said[4:] == ["waits"]
