"""A run of the real command whose completions are episodes of two turns, with weights that arrive inside and between
them."""

from __future__ import annotations

import sqlite3
import subprocess
from pathlib import Path

import pytest

from asyncdapo.replay.ledger.audit import audit
from asyncdapo.replay.ledger.ledger import read_group
from tests.controller.recomputed import assert_versions_are_true, num_shifted_apart, recorded_contexts
from tests.controller.runs import FinishedRun, command, launch
from tests.environment.hosting import ANSWERING

pytestmark = pytest.mark.soak

STEPS = 8
ENGINES = ["torch", pytest.param("vllm", marks=pytest.mark.vllm)]


def launched(run_dir: Path, engine: str, *overrides: str, timeout_s: float = 300) -> FinishedRun:
    """A run with payloads and a checkpoint of every step."""
    return launch(
        run_dir,
        f"environment.path={ANSWERING}:AsksBack",
        "environment.max_context=200",
        f"rollout.engine={engine}",
        f"run.steps={STEPS}",
        "rollout.slots=8",
        "rollout.on_update=recompute",
        "rollout.group_size=8",
        "replay.prompts_per_step=2",
        "replay.run_ahead=2",
        "replay.keep_payloads=true",
        "learner.lr=1e-3",  # so high that neighbouring versions differ visibly on nearly every response
        "learner.warmup_steps=0",
        "learner.checkpoint_every=1",
        "learner.keep_checkpoints=0",
        "eval.num_prompts=4",
        "eval.num_greedy_prompts=4",
        *overrides,
        timeout_s=timeout_s,
    )


@pytest.fixture(scope="module", params=ENGINES)
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> FinishedRun:
    return launched(tmp_path_factory.mktemp("environment_run") / "run", request.param)


@pytest.mark.timeout(500)
def test_episodes_are_trained_on_and_the_audit_is_clean(run: FinishedRun) -> None:
    assert run.exit_code == 0, run.output
    said = subprocess.run(command("audit", str(run.dir)), capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


def test_every_episode_has_its_turns_and_observations(run: FinishedRun) -> None:
    with sqlite3.connect(run.dir / "ledger.db") as ledger:
        groups = [read_group(run.dir, group_id)[0] for (group_id,) in ledger.execute("SELECT group_id FROM groups")]
    completions = [completion for group in groups for completion in group.completions]
    finished = [completion for completion in completions if completion.finish_reason == "stop"]
    assert finished
    for completion in finished:
        [context] = completion.contexts
        assert context.rooted
        assert [value for value, _ in context.sampled] == [1, 0, 1]
        assert completion.metrics["asked"] == 1.0
        assert completion.metrics["acc"] in (0.0, 1.0)


def test_each_turns_tokens_were_sampled_by_the_version_that_is_recorded(run: FinishedRun) -> None:
    assert_versions_are_true(run.dir, STEPS, at_least=4)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ENGINES)
def test_log_probs_of_200_episodes_that_fork_fit_their_versions_and_not_those_next_to_them(
    engine: str, tmp_path: Path
) -> None:
    steps, wide = 20, ("rollout.slots=64", "replay.prompts_per_step=4", "replay.max_staleness=4")
    own = (f"environment.path=agent:{ANSWERING}:forgets", "environment.concurrency=64")
    run = launched(tmp_path / "run", engine, f"run.steps={steps}", *wide, *own, timeout_s=800)
    assert run.exit_code == 0, run.output
    contexts = recorded_contexts(run.dir, steps)
    updated = sorted({one.completion for one in contexts if one.updated_between_turns})
    print(f"{engine}: {len(updated)} episodes with an update between two turns of a context")
    assert len(updated) >= 200
    checked = [one for one in contexts if one.completion in updated[:200]]
    num_apart = num_shifted_apart(run.dir, steps, checked)
    print(f"{engine}: of {len(checked)} contexts {num_apart} fit no version next to theirs")
    assert len(checked) >= 300, "most of them have forked"
    assert num_apart >= 0.9 * len(checked)  # an answer that is certain fits every version
    assert audit(run.dir) == []
