from __future__ import annotations

import math
from datetime import datetime
from io import StringIO

from asyncdapo.metrics.progress import ProgressLines

METRICS = {
    "step": 7,
    "reward/mean": -0.25,
    "eval/accuracy": 0.5,
    "rollout/tokens_per_s": 5123.4,
    "learner/tokens_per_s": 4100,
    "replay/staleness_mean": 1.25,
    "replay/staleness_max": 2,
    "replay/queued": 3,
    "learner/waiting_ratio": 0.127,
    "time/wall_s": 12.34,
}


def noon() -> datetime:
    return datetime(2000, 1, 1, 12, 0, 0)


def test_a_step_is_one_line_that_shows_both_sides():
    stream = StringIO()
    ProgressLines(stream, 36, noon).log(METRICS)
    assert stream.getvalue() == (
        "12:00:00  step  7/36  reward -0.250  accuracy 0.500  rollout tok/s   5,123  learner tok/s   4,100  "
        "staleness 1.25  max  2  queue    3  waiting  13%  wall    12.3 s\n"
    )


def test_lines_are_aligned_and_show_a_dash_for_what_is_missing_or_not_a_number():
    stream = StringIO()
    lines = ProgressLines(stream, 1000, noon)
    lines.log(METRICS)
    lines.log({"step": 1000, "reward/mean": math.nan, "time/wall_s": 1234.5})
    first, second = stream.getvalue().splitlines()
    assert len(first) == len(second)
    assert "reward      -  accuracy     -" in second


def test_greedy_accuracy_stands_only_where_it_was_measured():
    stream = StringIO()
    lines = ProgressLines(stream, 36, noon)
    lines.log(METRICS)
    lines.log(METRICS | {"eval/greedy_accuracy": 0.75})
    first, second = stream.getvalue().splitlines()
    assert "greedy" not in first
    assert second.endswith("greedy 0.750")


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
