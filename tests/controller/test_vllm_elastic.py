"""A run with vLLM that is scaled from one worker to two and back while it trains."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from asyncdapo.controller.process.roster import read
from asyncdapo.controller.process.wanted_workers import ask_for
from asyncdapo.replay.ledger.audit import audit
from tests.controller.interruptions import assert_nothing_lives, wait_for_batch, wait_until
from tests.controller.runs import started

pytestmark = [pytest.mark.vllm, pytest.mark.soak, pytest.mark.timeout(600)]
OVERRIDES = (
    "rollout.engine=vllm",
    "rollout.num_workers={min: 1, max: 2}",
    "rollout.slots=8",
    "replay.prompts_per_step=4",
    "run.steps=10000",
)
LIVES = "SELECT kind, worker, detail FROM events WHERE kind LIKE 'worker%' ORDER BY event_id"
LOST = "SELECT COUNT(*) FROM leases WHERE outcome = 'lost'"
TRAINED_ON = "SELECT DISTINCT worker FROM groups WHERE state = 'trained'"


def query(run_dir: Path, sql: str) -> list[tuple]:
    with closing(sqlite3.connect(run_dir / "ledger.db", timeout=20)) as ledger:
        return ledger.execute(sql).fetchall()


def test_a_second_engine_joins_is_trained_on_and_leaves_without_a_lost_lease(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, *OVERRIDES) as process:
        wait_until((run_dir / "config.yaml").exists, process)
        ask_for(run_dir, 1)
        wait_for_batch(run_dir, 2, process)
        ask_for(run_dir, 2)
        wait_until(lambda: (1,) in query(run_dir, TRAINED_ON), process)
        ask_for(run_dir, 1)
        wait_until(lambda: "rollout-1 has left" in (run_dir / "run.log").read_text(), process)
        wait_for_batch(run_dir, max(step for (step,) in query(run_dir, "SELECT step FROM batches")) + 2, process)
        assert [entry.index for entry in read(run_dir) if entry.role == "rollout"] == [0]
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    assert query(run_dir, LIVES)[:3] == [
        ("worker_joined", 0, query(run_dir, LIVES)[0][2]),
        ("worker_joined", 1, query(run_dir, LIVES)[1][2]),
        ("worker_drained", 1, "scaled to 1"),
    ]
    assert query(run_dir, LOST) == [(0,)]
    said = (run_dir / "run.log").read_text()
    assert "did not arrive" not in said
    assert "it is started again" not in said
    assert audit(run_dir) == []
    assert_nothing_lives(run_dir)
