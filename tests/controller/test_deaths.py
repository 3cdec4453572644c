"""Whichever process is killed, the run continues, and every prompt ends exactly once."""

from __future__ import annotations

import os
import re
import signal
import time
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

pytestmark = pytest.mark.timeout(600)


def stop_while_it_holds_a_lease(run_dir: Path, worker: int) -> None:
    """So that the kill that follows finds it in the middle of one, and not idle between two batches."""
    while True:
        os.kill(worker, signal.SIGSTOP)
        time.sleep(0.3)  # what it has sent is in the ledger by then
        if query(run_dir, "SELECT 1 FROM leases WHERE outcome IS NULL LIMIT 1"):
            return
        os.kill(worker, signal.SIGCONT)
        time.sleep(0.1)


def test_a_run_outlives_a_death_of_each_process_and_ends_with_the_cause_when_one_dies_too_often(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    often = "rollout.parity_every=1"  # so that deaths fall into a comparison of log-probs too
    with started(run_dir, *SHORT, "run.steps=100000", "controller.max_restarts=1", often) as process:

        def kill(role: str, num_steps: int = 2) -> None:
            """And see the run continue for so many steps, with another process in its place."""
            before = trained_steps(run_dir)
            (pid,) = processes(run_dir, role)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: processes(run_dir, role) not in ([], [pid]), process)
            wait_for_batch(run_dir, before + num_steps, process)

        wait_for_batch(run_dir, 1, process)
        stop_while_it_holds_a_lease(run_dir, *processes(run_dir, "rollout"))
        kill("rollout", num_steps=4)  # the first batches may still be of its groups
        (session,) = query(run_dir, "SELECT session FROM leases ORDER BY lease_id DESC LIMIT 1")[0]
        trained = "SELECT COUNT(*) FROM groups JOIN leases USING (lease_id) WHERE state = 'trained' AND session = ?"
        assert query(run_dir, trained, session)[0][0] > 0, "groups of the replacement are trained on"
        lost = {prompt for (prompt,) in query(run_dir, "SELECT prompt_id FROM leases WHERE outcome = 'lost'")}
        assert lost, "the worker held leases when it died"
        kill("scorer")
        kill("replay")
        kill("learner")
        os.kill(*processes(run_dir, "rollout"), signal.SIGKILL)
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 1, output
    assert re.search(r"rollout-0: the process died.*controller.max_restarts is 1", output.splitlines()[-1]), output
    again = query(run_dir, "SELECT prompt_id FROM leases WHERE attempt = 2 AND outcome = 'done'")
    ended = query(run_dir, "SELECT prompt_id FROM prompts WHERE state IN ('trained', 'filtered')")
    assert {prompt for (prompt,) in again} & {prompt for (prompt,) in ended} & lost, "a lost prompt is sampled again"
    assert query(run_dir, "SELECT branch FROM branches ORDER BY branch") == [(0,), (1,)]
    assert audit(run_dir) == []
    assert_nothing_lives(run_dir)
