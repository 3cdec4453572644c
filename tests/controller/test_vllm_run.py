"""A small run of the real command with vLLM; in the soak its worker is killed in the middle, or its engine.

As in `test_whole_run`, few slots make generation the slow side, so that weights arrive in the middle of responses, and
a checkpoint of every step is kept for what is recomputed afterwards. All tests share the run: engines start slowly.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from asyncdapo.controller.process.roster import is_running, read
from asyncdapo.replay.ledger.audit import audit
from tests.controller.interruptions import (
    assert_nothing_lives,
    num_lives_trained_on,
    processes,
    wait_for_batch,
    wait_until,
)
from tests.controller.recomputed import assert_versions_are_true
from tests.controller.runs import FinishedRun, started

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

STEPS = 7
OVERRIDES = (
    "rollout.engine=vllm",
    f"run.steps={STEPS}",
    "rollout.slots=8",
    "rollout.group_size=8",
    "rollout.on_update=recompute",
    "rollout.parity_every=4",
    "replay.run_ahead=3",  # else too little runs when weights arrive
    "replay.max_staleness=3",
    "replay.prompts_per_step=4",
    "replay.keep_payloads=true",
    "learner.lr=1e-3",  # so high that neighbouring versions differ visibly on nearly every response
    "learner.warmup_steps=0",
    "learner.checkpoint_every=1",
    "learner.keep_checkpoints=0",
    "filter.enabled=false",  # whatever is sampled is trained on
    "eval.every=0",
    "eval.num_prompts=8",
    "eval.num_greedy_prompts=8",
)


KILLED = [None, *(pytest.param(role, marks=pytest.mark.soak) for role in ("rollout", "engine"))]


@pytest.fixture(scope="module", params=KILLED)
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> FinishedRun:
    run_dir = tmp_path_factory.mktemp("vllm") / "run"
    with started(run_dir, *OVERRIDES) as process:
        if request.param:
            kill(request.param, run_dir, process)
        output, _ = process.communicate(timeout=300)
    num_lives = 2 if request.param else 1
    assert output.count("; it is started again") == num_lives - 1, output
    assert num_lives_trained_on(run_dir) == num_lives
    return FinishedRun(run_dir, process.returncode, output)


def kill(role: str, run_dir: Path, process: subprocess.Popen[str]) -> None:
    """No process of that life of the worker is left then, and steps are trained on groups of the next one."""
    wait_for_batch(run_dir, 2, process)
    before = [entry for entry in read(run_dir) if entry.role in ("rollout", "engine", "scorer")]
    os.kill(processes(run_dir, role)[0], signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, before)), process)
    wait_until(lambda: num_lives_trained_on(run_dir) == 2, process)


def test_it_ends_well_also_after_the_death_of_its_worker_or_engine(run: FinishedRun) -> None:
    assert run.exit_code == 0, run.output
    assert [line["step"] for line in run.lines] == list(range(STEPS + 1))
    assert audit(run.dir) == []
    assert_nothing_lives(run.dir)


def test_engine_and_learner_agree_on_every_version_that_is_compared(run: FinishedRun) -> None:
    compared = {line["step"]: line["rollout/parity_max"] for line in run.lines if "rollout/parity_max" in line}
    assert 0 in compared
    assert len(compared) >= 2
    assert all(0 < most < 1e-3 for most in compared.values()), compared


def test_log_probs_are_those_of_the_recorded_versions(run: FinishedRun) -> None:
    assert_versions_are_true(run.dir, STEPS, at_least=8, num=16)
