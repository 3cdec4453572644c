"""Asked to stop, at whatever moment, a run keeps what is done and ends in time. `test_deaths` stops one by default."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from asyncdapo.controller.process.roster import survivors
from asyncdapo.metrics.jsonl import read_metrics
from asyncdapo.replay.ledger.audit import audit
from tests.controller.interruptions import (
    END_S,
    SHORT,
    assert_nothing_lives,
    go_on,
    processes,
    stop,
    survey,
    wait_for_batch,
    wait_until,
)
from tests.controller.runs import launch, started
from tests.environment.hosting import ANSWERING

EPISODES = (f"environment.path={ANSWERING}:AsksBack", "environment.max_context=200")


def wait_for_line(run_dir: Path, words: str, process: subprocess.Popen[str]) -> None:
    """Until run.log says so."""
    log = run_dir / "run.log"
    wait_until(lambda: log.exists() and words in log.read_text(), process)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_run_asked_to_stop_finishes_its_step_writes_a_checkpoint_and_resumes_from_there(tmp_path: Path) -> None:
    """Of episodes of two turns, which stop and resume as all else does."""
    run_dir, rare = tmp_path / "run", ("learner.checkpoint_every=1000", "metrics.wandb=offline")
    with started(run_dir, *SHORT, *EPISODES, *rare, "run.steps=100000") as process:
        wait_for_batch(run_dir, 2, process)
        output = stop(process, signal.SIGTERM)
    before = survey(run_dir)
    assert before.checkpoint == max(before.trained) >= 2
    written = rf"waits for the checkpoint of step {before.checkpoint} \(\d+\.\d MiB\) to be written, within 20 s"
    assert re.search(written, output), output
    assert f"stopped after step {before.checkpoint}: the same command resumes from there" in output
    assert list(run_dir.glob("wandb/offline-run-*/run-*.wandb")), "W&B was left to finish"
    assert_nothing_lives(run_dir)
    assert audit(run_dir) == []
    resumed = go_on(run_dir, before, 2, *EPISODES)
    assert resumed.lines[-1]["rollout/turns_mean"] > 1


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_evaluations_are_given_up_for_it_and_made_up_for(tmp_path: Path) -> None:
    run_dir, long = tmp_path / "run", ("eval.num_prompts=2000", "eval.num_greedy_prompts=1000")
    with started(run_dir, *SHORT, *long, "run.steps=2") as process:
        wait_for_line(run_dir, "evaluating the initial model", process)
        stop(process, signal.SIGINT, within_s=END_S)
    with started(run_dir, *SHORT, "run.steps=2") as process:
        wait_for_line(run_dir, "evaluating the final model", process)
        stop(process, signal.SIGTERM, within_s=END_S)
    assert "eval/greedy_accuracy" not in read_metrics(run_dir)[-1]
    run = launch(run_dir, *SHORT, "run.steps=2")
    assert run.exit_code == 0, run.output
    assert [line["step"] for line in run.lines] == [0, 1, 2]
    for line in (run.lines[0], run.lines[2]):
        assert {"eval/accuracy", "eval/greedy_accuracy"} <= set(line)
    assert audit(run_dir) == []


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_step_that_takes_longer_than_that_is_given_up(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, *SHORT, "run.steps=100000", "run.stop_s=3") as process:
        wait_for_batch(run_dir, 4, process)
        os.kill(*processes(run_dir, "learner"), signal.SIGSTOP)
        output = stop(process, signal.SIGTERM, within_s=3 + END_S)
    assert "the same command repeats what came after the last checkpoint" in output
    assert not survivors(run_dir)
    go_on(run_dir, survey(run_dir))


@pytest.mark.soak
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after_s", [0.3, 0.6, 1.0, 1.6, 2.4, 3.2, 4.0, 5.0, 7.0])
def test_at_any_moment_of_its_start_it_leaves_nothing_behind(
    tmp_path: Path, sent: signal.Signals, after_s: float
) -> None:
    with started(tmp_path / "run", *SHORT, "run.steps=100000") as process:
        time.sleep(after_s)
        stop(process, sent, within_s=END_S)
