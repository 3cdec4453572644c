"""A server of Ray's that dies ends the run in a line, and the run resumes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from asyncdapo.controller.process.reaper import descendants
from tests.controller.interruptions import SHORT, assert_nothing_lives, wait_for_batch
from tests.controller.runs import FinishedRun, launch, started

LEARNER_OF_TWO = ("learner.ranks=2", "learner.threads=1")


def pid_of(server: str, driver: int) -> int:
    return next(process.pid for process in descendants(driver) if process.name() == server)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
def test_the_run_resumes_after_a_server_of_ray_was_killed(server: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, *SHORT, *LEARNER_OF_TWO, "run.steps=100000") as process:
        wait_for_batch(run_dir, 8, process)
        os.kill(pid_of(server, process.pid), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    assert_ended_in_a_line(FinishedRun(run_dir, process.returncode, output), server)
    assert_nothing_lives(run_dir)
    run = launch(run_dir, *SHORT, *LEARNER_OF_TWO, "run.steps=14")
    assert run.exit_code == 0, run.output
    assert "resumes after step" in run.output


def assert_ended_in_a_line(run: FinishedRun, server: str) -> None:
    assert run.exit_code == 1, run.output
    cause = f"the run ended: Ray's process {server} died; the same command resumes from the last checkpoint"
    *before, said, last = run.output.splitlines()
    assert said.endswith(cause)
    assert last == f"asyncdapo: {cause}"
    assert not [line for line in before if "gcs" in line.lower() or "raylet" in line.lower()], run.output
