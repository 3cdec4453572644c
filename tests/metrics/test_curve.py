from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from asyncdapo.metrics.curve import draw_curve, make_figure

LINES = [
    {"step": 0, "time/wall_s": 0.0, "eval/accuracy": 0.25, "eval/greedy_accuracy": 0.5},
    {"step": 1, "time/wall_s": 2.0, "reward/mean": -0.5, "replay/staleness_mean": 0.0, "replay/staleness_max": 0},
    {"step": 2, "time/wall_s": 3.0, "reward/mean": math.nan, "replay/staleness_mean": 0.5, "replay/staleness_max": 1},
    {"step": 3, "time/wall_s": 5.0, "reward/mean": 0.5, "eval/accuracy": 0.75, "eval/greedy_accuracy": 1.0},
]


def curves(axes: Axes) -> dict[str, list[list[float]]]:
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_each_panel_holds_the_points_that_were_measured():
    over_time, over_steps, reward, staleness = make_figure("quickstart", LINES).axes
    assert curves(over_time) == {
        "sampled 0.25 → 0.75": [[0.0, 0.25], [5.0, 0.75]],
        "greedy 0.50 → 1.00": [[0.0, 0.5], [5.0, 1.0]],
    }
    assert curves(over_steps)["sampled 0.25 → 0.75"] == [[0.0, 0.25], [3.0, 0.75]]
    assert curves(reward) == {"all groups": [[1.0, -0.5], [3.0, 0.5]]}
    assert curves(staleness) == {"mean of the batch": [[1.0, 0.0], [2.0, 0.5]]}
    assert [area.get_label() for area in staleness.collections] == ["highest of the batch"]


@pytest.mark.parametrize("lines", [[], LINES[:1]])
def test_a_panel_without_numbers_says_so(lines: list[dict[str, float]]):
    *_, staleness = make_figure("quickstart", lines).axes
    assert [text.get_text() for text in staleness.texts] == ["not measured in this run"]


def test_the_curve_of_a_run_is_a_picture_beside_its_metrics(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    path = draw_curve(tmp_path)
    assert path == tmp_path / "curve.png"
    height, width, _ = imread(path).shape
    assert (width, height) == (1500, 1110)


def test_the_curve_of_a_resumed_run_has_each_step_once_and_passes_over_what_a_line_lacks():
    """The line of step 2 was made from the ledger: it has no reward over all groups."""
    lines = [*LINES[:2], {"step": 2, "time/wall_s": 3.0, "reward/filtered_mean": 0.25}, LINES[3]]
    over_time, _, reward, _ = make_figure("quickstart", lines).axes
    assert curves(over_time)["sampled 0.25 → 0.75"] == [[0.0, 0.25], [5.0, 0.75]]
    assert curves(reward) == {"all groups": [[1.0, -0.5], [3.0, 0.5]], "groups trained on": [[2.0, 0.25]]}


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, asyncdapo.metrics.curve; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
