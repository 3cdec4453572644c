"""A process that hangs is never waited for in silence, and not for ever."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from asyncdapo.replay.audit import audit
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

IMPATIENT = ("controller.report_wait_s=2", "controller.stall_s=6")


@pytest.mark.timeout(300)
def test_a_run_outlives_a_learner_a_worker_and_a_replay_server_that_are_stopped(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, *SHORT, *IMPATIENT, "run.steps=100000") as process:

        def stop(role: str) -> None:
            before = trained_steps(run_dir)
            (pid,) = processes(run_dir, role)
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: processes(run_dir, role) not in ([], [pid]), process)
            wait_for_batch(run_dir, before + 4, process)

        wait_for_batch(run_dir, 1, process)
        stop("learner")
        stop("rollout")
        stop("replay")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
    for name in ("learner", "rollout-0", "replay"):
        stall = rf"stalled: nothing has moved for \d+ s(\n.*)*?\n{name}: does not answer\n"
        assert re.search(stall, output), f"{name} is the root of a stall\n{output}"
        assert re.search(rf"stacks of {name}:\nstopped: state T\n", output), output
        assert f"{name} is killed and started again" in output, output
    assert query(run_dir, "SELECT branch FROM branches ORDER BY branch") == [(0,), (1,)]
    assert audit(run_dir) == []
    assert_nothing_lives(run_dir)
