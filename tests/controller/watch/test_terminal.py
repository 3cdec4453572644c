"""What `asyncdapo watch` draws: at every size within the terminal, and what matters first."""

from __future__ import annotations

import math
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from asyncdapo.cli import main
from asyncdapo.controller.process.roster import Roster, this_process
from asyncdapo.controller.watch.run_state import RunState
from asyncdapo.controller.watch.terminal import picture
from asyncdapo.replay.workers_file import WorkerRow, write_rows
from tests.controller.watch.run_files import bound_by_learner, run_files

NOTE = "16:00:02  note [bold] that is longer than a narrow terminal is wide, so that it needs lines of its own\n"


def drawn(run_dirs: list[Path], width: int, height: int) -> list[str]:
    runs = [RunState(run_dir) for run_dir in run_dirs]
    for run in runs:
        run.update()
    console = Console(file=StringIO(), record=True, width=width, height=height, force_terminal=True)
    console.print(picture(runs, width, height))
    return console.export_text().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (160, 50)])
def test_one_run_fits_with_its_pipeline_curves_and_verdict(tmp_path: Path, width: int, height: int) -> None:
    run_dir = run_files(tmp_path / "my [red]run", bound_by_learner(40), "run.steps=50")
    (run_dir / "run.log").write_text(NOTE * 60)
    lines = drawn([run_dir], width, height)
    text = "\n".join(lines)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("my [red]run  ended early")
    assert "step 41/50, 1:00 trained" in text
    for shown in (
        "prompts →",
        "rollout →",
        "2,000 tok/s",
        "12 queued",
        "1.25 ahead",
        "reward",
        "▁",
        "█",
        "0.111 → 4.56",
    ):
        assert shown in text
    assert "verdict  learner-bound, 40%" in text
    assert "16:00:02  note [bold] that is longer" in text


def test_a_large_terminal_shows_what_each_worker_said_last(tmp_path: Path) -> None:
    run_dir = run_files(tmp_path, bound_by_learner(4))
    Roster(run_dir).set("rollout-0", [this_process("rollout", 0), this_process("rollout", 1)])
    heard_at_s = time.time() - 125
    write_rows(run_dir, [WorkerRow(worker=0, heard_at_s=heard_at_s, leases=3, tokens_per_s=1234.4, running=math.nan)])
    first, second = (line for line in drawn([run_dir], 130, 40) if line.startswith(("rollout 0", "rollout 1")))
    assert first.rstrip().endswith("2:05 ago")
    assert "1,234" in first
    assert "nan" not in first
    assert "ago" not in second


def test_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    (first, second, *_) = drawn([run_files(tmp_path, [])], 80, 24)
    assert "ended early" in first
    assert "step 0/36, no step yet" in second


def test_several_runs_are_a_row_each(tmp_path: Path) -> None:
    run_dirs = [run_files(tmp_path / name, bound_by_learner(num), "run.steps=9") for name, num in (("a", 5), ("b", 8))]
    heading, first, second = drawn(run_dirs, 80, 24)
    assert heading.split() == ["run", "state", "step", "reward", "accuracy", "limit", "left"]
    assert (first.split()[:4], second.split()[:3]) == (["a", "ended", "early", "6/9"], ["b", "finished", "9/9"])
    assert (second.split()[-3:]) == ["0.5", "learner", "-"]


def test_the_command_shows_a_run_that_is_over_once_and_names_a_directory_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_files(tmp_path / "run", bound_by_learner(5))
    assert main(["watch", str(tmp_path / "run")]) == 0
    assert "step 6/36" in capsys.readouterr().out
    assert main(["watch", str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err
