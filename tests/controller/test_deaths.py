"""Whichever process is killed, the run goes on, and every prompt ends exactly once."""

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

pytestmark = pytest.mark.timeout(240)


def test_a_run_outlives_the_death_of_its_worker_its_replay_server_its_learner_and_its_scorer(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, *SHORT, "run.steps=100000", "replay.keep_payloads=true") as process:

        def kill(role: str) -> None:
            before = trained_steps(run_dir)
            (pid,) = processes(run_dir, role)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: processes(run_dir, role) not in ([], [pid]), process)
            wait_for_batch(run_dir, before + 4, process)

        wait_for_batch(run_dir, 1, process)
        held = query(run_dir, "SELECT prompt_id FROM leases WHERE outcome IS NULL")
        kill("rollout")
        (session,) = query(run_dir, "SELECT session FROM leases ORDER BY lease_id DESC LIMIT 1")
        (trained,) = query(
            run_dir,
            "SELECT COUNT(*) FROM groups JOIN leases USING (lease_id) WHERE state = 'trained' AND session = ?",
            *session,
        )
        assert trained[0] > 0, "groups of the replacement are trained on"
        lost = query(run_dir, "SELECT prompt_id FROM leases WHERE outcome = 'lost'")
        assert lost, f"the worker held leases when it died: {held}"
        kill("replay")
        kill("learner")
        (pid,) = processes(run_dir, "scorer")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: processes(run_dir, "scorer") not in ([], [pid]), process)
        wait_for_batch(run_dir, trained_steps(run_dir) + 3, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
    assert len(re.findall("the process died", output)) == 3, output
    second = query(run_dir, "SELECT prompt_id, attempt FROM leases WHERE attempt = 2")
    assert {prompt for prompt, _ in second} & {prompt for (prompt,) in lost}, "a lost prompt is sampled again"
    assert query(run_dir, "SELECT branch FROM branches ORDER BY branch") == [(0,), (1,)]
    assert audit(run_dir) == []
    assert_nothing_lives(run_dir)


def test_a_process_that_dies_again_and_again_ends_the_run_with_the_cause(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, *SHORT, "run.steps=100000", "controller.max_restarts=1") as process:
        wait_for_batch(run_dir, 1, process)
        (pid,) = processes(run_dir, "rollout")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: processes(run_dir, "rollout") not in ([], [pid]), process)
        os.kill(*processes(run_dir, "rollout"), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1, output
    assert re.search(r"rollout-0: the process died.*controller.max_restarts is 1", output.splitlines()[-1]), output
    assert audit(run_dir) == []
    assert_nothing_lives(run_dir)
