"""`asyncdapo scale` as a user types it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asyncdapo.cli import main
from asyncdapo.config.config import load_config, to_yaml
from asyncdapo.config.found import find_config
from asyncdapo.controller.process.roster import Entry, Roster, this_process
from asyncdapo.controller.process.wanted_workers import asked_for


def run_in(run_dir: Path, num_workers: str, controller: Entry | None = None) -> Path:
    """The files of a run whose driver is this process, unless told otherwise."""
    keys = [f"run.dir={run_dir}", f"rollout.num_workers={num_workers}"]
    (run_dir / "config.yaml").write_text(to_yaml(load_config(find_config("quickstart"), keys)))
    Roster(run_dir).set("controller", [controller or this_process("controller")])
    return run_dir


def test_a_number_within_the_range_is_left_for_the_driver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run_in(tmp_path, "{min: 1, max: 4}")
    assert asked_for(run_dir) is None
    for number in (3, 2):
        assert main(["scale", str(run_dir), str(number)]) == 0
        assert asked_for(run_dir) == number
        assert f"{number} rollout workers are asked for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_workers", "number", "said"),
    [
        ("{min: 2, max: 4}", "1", "rollout.num_workers: doesn't allow 1 in "),
        ("{min: 2, max: 4}", "5", "launch it again with another range"),
        ("2", "3", "launch it again with a range, {min: 1, max: 4}"),
    ],
)
def test_a_number_that_the_run_does_not_allow_is_refused_with_the_fix(
    num_workers: str, number: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale", str(run_in(tmp_path, num_workers)), number]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert asked_for(tmp_path) is None


def test_a_run_that_is_over_or_never_was_is_the_users_to_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale", str(tmp_path / "nothing"), "2"]) == 2
    assert "no run was started there" in capsys.readouterr().err
    ended = Entry(role="controller", index=0, pid=os.getpid(), host=this_process("controller").host, started=0.0)
    run_dir = run_in(tmp_path, "{min: 1, max: 4}", ended)
    assert main(["scale", str(run_dir), "2"]) == 2
    assert "its run is over" in capsys.readouterr().err
