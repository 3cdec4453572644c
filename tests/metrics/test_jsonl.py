from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from asyncdapo.metrics import jsonl
from asyncdapo.metrics.jsonl import MetricsFile, read_metrics, whole_lines


def lines_of(run_dir: Path, name: str = "metrics.jsonl") -> list[str]:
    return (run_dir / name).read_text().splitlines()


def steps_of(run_dir: Path) -> list[float]:
    return [line["step"] for line in read_metrics(run_dir)]


def undone(run_dir: Path) -> list[tuple[int, int]]:
    """Step of each undone line, and the branch that undid it."""
    records, num_torn = whole_lines(run_dir, "metrics.undone.jsonl")
    assert num_torn == 0
    return [(record["step"], record["undone_by"]) for record in records]


def write_steps(run_dir: Path, *steps: int) -> MetricsFile:
    file = MetricsFile(run_dir)
    for step in steps:
        file.log({"step": step, "time/wall_s": step + 0.5})
    return file


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
        raise AssertionError(f"{constant} isn't JSON")

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


# ------------------------------------------------------------------------------------------------------------ rollback


def test_a_rollback_moves_later_lines_word_for_word_and_the_file_continues_after_them(tmp_path: Path):
    file = write_steps(tmp_path, 0, 1, 2, 3, 4)
    former = lines_of(tmp_path)
    assert file.roll_back(2, undone_by=1) == ([3, 4], [])
    assert lines_of(tmp_path) == former[:3]
    assert lines_of(tmp_path, "metrics.undone.jsonl") == [
        line.replace("}", ', "undone_by": 1}') for line in former[3:]
    ]  # fmt: skip
    file.log({"step": 3})
    file.log({"step": 4})
    file.roll_back(3, undone_by=2)
    file.log({"step": 4})
    file.close()
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4]
    assert undone(tmp_path) == [(3, 1), (4, 1), (4, 2)]


def test_a_resumed_file_continues_after_its_last_line_and_leaves_out_a_torn_one(tmp_path: Path):
    write_steps(tmp_path, 0, 1).close()
    with (tmp_path / "metrics.jsonl").open("a") as text:
        text.write('{"step": 2, "rew')
    file = MetricsFile(tmp_path, go_on=True)
    assert (file.num_torn, file.last_line) == (1, {"step": 1, "time/wall_s": 1.5})
    with pytest.raises(ValueError, match="step 1 came after those of step 1"):
        file.log({"step": 1})
    file.log({"step": 2})
    file.close()
    assert steps_of(tmp_path) == [0, 1, 2]


def test_lines_that_a_power_cut_spoiled_are_left_out_and_may_be_put_in_again(tmp_path: Path):
    file = write_steps(tmp_path, 0, 1, 2, 3)
    file.close()
    lines = lines_of(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "\0" * 20, lines[2], ""]))
    file = MetricsFile(tmp_path, go_on=True)
    assert file.num_torn == 1
    known = [{"step": step, "replay/trained_groups": 4} for step in (1, 2, 3)]
    assert file.roll_back(2, undone_by=1, missing=known) == ([], [{"step": 1, "replay/trained_groups": 4}])
    file.close()
    assert lines_of(tmp_path) == [lines[0], '{"step": 1, "replay/trained_groups": 4}', lines[2]]


def test_a_run_that_died_before_its_first_line_is_resumed_without_a_file(tmp_path: Path):
    file = MetricsFile(tmp_path, go_on=True)
    file.roll_back(0, undone_by=1)
    file.log({"step": 0})
    file.close()
    assert steps_of(tmp_path) == [0]
    assert not (tmp_path / "metrics.undone.jsonl").exists()


def test_a_line_that_is_written_can_be_amended(tmp_path: Path):
    file = write_steps(tmp_path, 0, 1)
    file.log({"step": 2, "learner/loss": math.nan})
    line = file.amend({"eval/accuracy": 0.5})
    assert (line["step"], line["eval/accuracy"]) == (2, 0.5)
    file.log({"step": 3})
    file.close()
    assert lines_of(tmp_path)[2:] == ['{"step": 2, "eval/accuracy": 0.5, "learner/loss": null}', '{"step": 3}']


@pytest.mark.parametrize("num_replaced", [0, 1])
def test_a_process_that_dies_between_the_two_files_loses_no_line_and_doubles_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_replaced: int
):
    """It dies before either file is replaced, or after the first."""
    file = write_steps(tmp_path, 0, 1, 2, 3, 4)
    file.roll_back(3, undone_by=1)
    file.log({"step": 4})
    replace, calls = jsonl.replace_file, []

    def die(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) > num_replaced:
            raise KeyboardInterrupt
        replace(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(jsonl, "replace_file", die)
        with pytest.raises(KeyboardInterrupt):
            file.roll_back(2, undone_by=2)
    assert {0, 1, 2, 3, 4} <= {*steps_of(tmp_path), *(step for step, _ in undone(tmp_path))}
    again = MetricsFile(tmp_path, go_on=True)
    again.roll_back(2, undone_by=3)
    again.close()
    assert steps_of(tmp_path) == [0, 1, 2]
    by = 2 if num_replaced else 3
    assert undone(tmp_path) == [(4, 1), (3, by), (4, by)]


KILLED = """
import sys
from pathlib import Path
from asyncdapo.metrics.jsonl import MetricsFile

file = MetricsFile(Path(sys.argv[1]), go_on=True)
print("ready", flush=True)
branch, number = int(sys.argv[2]), int(sys.argv[3])
while True:
    branch += 1
    file.roll_back(3, branch)
    for step in range(4, 40):
        number += 1
        file.log({"step": step, "number": number, "padding": 0.123456789})
"""


def test_a_writer_killed_at_any_moment_leaves_each_line_in_one_of_the_files_once_it_is_resumed(tmp_path: Path):
    write_steps(tmp_path, 0, 1, 2, 3).close()
    rng, last_number = random.Random(1), 0
    for life in range(10):
        writer = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(1000 * life), str(last_number)], stdout=subprocess.PIPE
        )
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.05))
        writer.kill()
        writer.communicate()
        resumed = MetricsFile(tmp_path, go_on=True)
        resumed.roll_back(3, 1000 * life + 999)
        resumed.close()
        assert steps_of(tmp_path) == [0, 1, 2, 3]
        numbers = [line["number"] for line in whole_lines(tmp_path, "metrics.undone.jsonl")[0]]
        assert numbers == list(range(1, len(numbers) + 1))
        last_number = len(numbers)
    assert last_number > 0
