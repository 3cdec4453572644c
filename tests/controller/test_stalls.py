"""A process that hangs is never waited for in silence, and not for ever."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from asyncdapo.replay.ledger.audit import audit
from tests.controller.interruptions import (
    SHORT,
    assert_nothing_lives,
    processes,
    query,
    trained_steps,
    wait_for_batch,
    wait_until,
)
from tests.controller.runs import started

IMPATIENT = ("controller.report_wait_s=2", "controller.stall_s=6", "reward.timeout_s=2")


def outlive(run_dir: Path, *roles: str) -> None:
    """A run in which these processes are stopped one after the other: each is found, named, killed and replaced."""
    with started(run_dir, *SHORT, *IMPATIENT, "run.steps=100000") as process:
        wait_for_batch(run_dir, 1, process)
        for role in roles:
            before = trained_steps(run_dir)
            (pid,) = processes(run_dir, role)
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda role=role, pid=pid: processes(run_dir, role) not in ([], [pid]), process)
            wait_for_batch(run_dir, before + 4, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
    for name in ("rollout-0" if role == "rollout" else role for role in roles):
        report = rf"controller waits for \S+ since \d+ s: .*; {name}: does not answer\n"
        assert re.search(report, output), output
        stall = rf"stalled: nothing has moved for \d+ s\ncontroller waits for .*\n(.* waits for .*\n)*{name}: does not"
        assert re.search(stall, output), output
        assert re.search(rf"stacks of {name}:\n{name}: it is stopped\n", output), output
        assert f"{name} is killed and started again: it is what the others wait for" in output, output
    num_branches = 1 + roles.count("learner")
    assert query(run_dir, "SELECT branch FROM branches ORDER BY branch") == [(n,) for n in range(num_branches)]
    assert audit(run_dir) == []
    assert_nothing_lives(run_dir)


@pytest.mark.timeout(600)
@pytest.mark.soak
def test_a_learner_that_is_stopped_is_killed_and_the_run_continues(tmp_path: Path) -> None:
    outlive(tmp_path / "run", "learner")


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_so_are_a_worker_and_a_replay_server(tmp_path: Path) -> None:
    outlive(tmp_path / "run", "rollout", "replay")
