from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from asyncdapo.metrics.jsonl import MetricsFile, read_metrics


def lines_of(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def test_each_step_is_one_line_at_once_with_the_step_first_and_the_rest_by_name(tmp_path: Path):
    file = MetricsFile(tmp_path)
    file.log({"time/wall_s": 0.0, "eval/accuracy": 0.25, "step": 0})
    file.log({"reward/mean": -0.5, "step": 1, "filter/kept_ratio": 1})
    assert lines_of(tmp_path) == [
        '{"step": 0, "eval/accuracy": 0.25, "time/wall_s": 0.0}',
        '{"step": 1, "filter/kept_ratio": 1, "reward/mean": -0.5}',
    ]
    file.close()


def test_numbers_that_json_does_not_know_are_null_and_read_back_as_nan(tmp_path: Path):
    file = MetricsFile(tmp_path)
    file.log({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5), "e": np.int64(3)})
    file.close()

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(lines_of(tmp_path)[0], parse_constant=refuse) == {
        "step": 1, "a": None, "b": None, "c": None, "d": 0.5, "e": 3.0,
    }  # fmt: skip
    [read] = read_metrics(tmp_path)
    assert math.isnan(read["a"])
    assert read["d"] == 0.5


def test_a_step_that_is_not_past_the_last_one_is_refused(tmp_path: Path):
    file = MetricsFile(tmp_path)
    file.log({"step": 3})
    with pytest.raises(ValueError, match="step 3 came after those of step 3"):
        file.log({"step": 3})
    file.close()


def test_an_existing_file_is_left_alone(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    with pytest.raises(FileExistsError):
        MetricsFile(tmp_path)


def test_a_line_in_which_the_writer_died_is_left_out(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "rew')
    assert read_metrics(tmp_path) == [{"step": 1}]
