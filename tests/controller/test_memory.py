"""Memory and disk of a long run stay where they are, whoever is held up."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from asyncdapo.replay.ledger.audit import audit
from tests.controller.interruptions import (
    SHORT,
    assert_nothing_lives,
    processes,
    trained_steps,
    wait_for_batch,
)
from tests.controller.runs import started

OTHERS = ("controller", "replay", "rollout", "scorer")
SETTLE_S = 10.0
MAX_GROWTH_MIB = 10.0


def memory(run_dir: Path) -> dict[str, float]:
    """MiB of each process but the learner."""
    return {role: psutil.Process(pid).memory_info().rss / 2**20 for role in OTHERS for pid in processes(run_dir, role)}


@pytest.mark.soak
@pytest.mark.parametrize("held_s", [40, 300])
@pytest.mark.timeout(600)
def test_a_learner_that_is_held_up_leaves_the_memory_of_the_others_flat(tmp_path: Path, held_s: float) -> None:
    run_dir = tmp_path / "run"
    with started(
        run_dir, *SHORT, "run.steps=100000", "controller.stall_s=1000", "controller.report_wait_s=5"
    ) as process:
        wait_for_batch(run_dir, 10, process)
        (learner,) = processes(run_dir, "learner")
        os.kill(learner, signal.SIGSTOP)
        time.sleep(SETTLE_S)
        before, step = memory(run_dir), trained_steps(run_dir)
        assert set(before) == set(OTHERS)
        time.sleep(held_s - SETTLE_S)
        after = memory(run_dir)
        assert trained_steps(run_dir) == step, "the learner was held up"
        os.kill(learner, signal.SIGCONT)
        wait_for_batch(run_dir, step + 5, process)
        assert processes(run_dir, "learner") == [learner], "it continued by itself"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
    growth = {role: after[role] - before[role] for role in OTHERS}
    assert max(growth.values()) < MAX_GROWTH_MIB, growth
    assert "learner: does not answer" in output
    assert audit(run_dir) == []
    assert_nothing_lives(run_dir)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_memory_is_flat_over_many_steps(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    sizes = []
    with started(run_dir, *SHORT, "run.steps=100000", "filter.enabled=false", "learner.checkpoint_every=10") as process:
        for step in (60, 120, 180, 240, 300):  # more lines than that and the pipe of its output is full
            wait_for_batch(run_dir, step, process, timeout_s=300)
            sizes.append(memory(run_dir))
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
    growth = {role: sizes[-1][role] - sizes[0][role] for role in OTHERS}
    assert max(growth.values()) < MAX_GROWTH_MIB, sizes
    assert audit(run_dir) == []
