"""A run with a range of workers: they join, are asked to leave in every way, and what they held is trained on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from asyncdapo.cli import main
from asyncdapo.replay.ledger.audit import audit
from tests.controller.interruptions import (
    SHORT,
    assert_nothing_lives,
    processes,
    query,
    wait_for_batch,
    wait_until,
)
from tests.controller.runs import started

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]


def test_workers_join_and_leave_a_run_that_trains_and_nothing_is_lost(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, *SHORT, "run.steps=100000", "rollout.num_workers={min: 1, max: 3}") as process:
        wait_for_batch(run_dir, 1, process)
        wait_until(lambda: len(processes(run_dir, "rollout")) == 3, process)
        assert main(["scale", str(run_dir), "2"]) == 0
        drained = "SELECT worker, detail FROM events WHERE kind = 'worker_drained' ORDER BY event_id"
        wait_until(lambda: query(run_dir, drained) == [(2, "scaled to 2")], process)
        before = processes(run_dir, "rollout")
        os.kill(before[0], signal.SIGTERM)
        wait_until(lambda: query(run_dir, drained)[1:] == [(0, "SIGTERM")], process)
        joined = "SELECT COUNT(*) FROM events WHERE kind = 'worker_joined'"
        wait_until(lambda: query(run_dir, joined) == [(4,)], process)
        assert set(processes(run_dir, "rollout")) & set(before) == {before[1]}
        (steps,) = query(run_dir, "SELECT COALESCE(MAX(step), 0) FROM batches")[0]
        wait_for_batch(run_dir, steps + 3, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert query(run_dir, "SELECT COUNT(*) FROM leases WHERE outcome = 'lost'") == [(0,)]
    assert query(run_dir, "SELECT COUNT(*) FROM prompts WHERE attempts > 0") == [(0,)]
    assert audit(run_dir) == []
    assert_nothing_lives(run_dir)
