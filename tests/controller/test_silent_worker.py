"""A worker that is stopped in the middle of a run: the others go on without it, and it comes back."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from asyncdapo.controller.process.roster import read
from asyncdapo.metrics.jsonl import read_metrics
from asyncdapo.replay.ledger.audit import audit
from tests.controller.living import eventually
from tests.controller.runs import started, wait_for_step

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]


def test_a_stopped_worker_misses_versions_and_catches_up_when_it_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, "run.steps=400", "rollout.num_workers=2", "replay.heartbeat_s=20") as process:
        wait_for_step(run_dir, 3, process)  # so it is known how long a transfer takes
        [pid] = [entry.pid for entry in read(run_dir) if entry.name == "rollout-1"]
        os.kill(pid, signal.SIGSTOP)
        log = run_dir / "run.log"
        eventually(lambda: "rollout-1: no sign of life, left out until there is one" in log.read_text(), 60)
        step = max(line["step"] for line in read_metrics(run_dir))
        wait_for_step(run_dir, step + 2, process)
        os.kill(pid, signal.SIGCONT)
        eventually(lambda: "rollout-1 caught up with version" in log.read_text(), 60)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    said = log.read_text()
    assert "gave no answer in" not in said
    assert "it is started again" not in said
    assert audit(run_dir) == []
