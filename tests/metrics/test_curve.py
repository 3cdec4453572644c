from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from asyncdapo.metrics.curve import draw_curve

FIRST = {"step": 0, "time/wall_s": 0.0, "eval/accuracy": 0.25, "eval/greedy_accuracy": 0.5}
SECOND = {
    "step": 1,
    "time/wall_s": 2.0,
    "reward/mean": -0.25,
    "reward/filtered_mean": None,
    "replay/staleness_mean": 0.5,
    "replay/staleness_max": 1,
}


def colors_of(lines: list[dict], run_dir: Path) -> set[str]:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rgb = (imread(draw_curve(run_dir))[:, :, :3] * 255).round().astype(int)
    return {f"#{color:06x}" for color in np.unique(rgb @ [1 << 16, 1 << 8, 1])}


def test_every_measured_curve_is_drawn(tmp_path: Path):
    third = SECOND | {"step": 2, "time/wall_s": 3.0, "reward/filtered_mean": 0.0, "eval/accuracy": 0.5}
    colors = colors_of([FIRST, SECOND, third], tmp_path)
    assert {"#2f6db3", "#d9742b", "#3c8c4d", "#d5dae1"} <= colors


@pytest.mark.parametrize("lines", [[], [FIRST, {"step": 1, "time/wall_s": 1.0}]])
def test_a_run_that_ended_early_or_measured_little_is_drawn_too(lines: list[dict], tmp_path: Path):
    assert colors_of(lines, tmp_path)


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, asyncdapo.metrics.curve; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
