"""A run of the real command whose episodes are made by a program that calls the model: its histories part, and weights
arrive inside and between its calls."""

from __future__ import annotations

import sqlite3
import subprocess

import pytest

from asyncdapo.messages import Group
from asyncdapo.replay.ledger.ledger import read_group
from asyncdapo.transport.payload import Payload
from tests.controller.recomputed import assert_versions_are_true
from tests.controller.runs import FinishedRun, command
from tests.controller.test_environment_run import ENGINES, STEPS, launched
from tests.environment.hosting import FILE

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module", params=ENGINES)
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> FinishedRun:
    program = f"environment.path=agent:{FILE.with_name('parting.py')}:run"
    sizes = ("environment.max_context=250", "rollout.max_response_length=160")
    return launched(tmp_path_factory.mktemp("agent_run") / "run", request.param, program, *sizes)


def groups_of(run: FinishedRun) -> list[tuple[Group, Payload]]:
    with sqlite3.connect(run.dir / "ledger.db") as ledger:
        return [read_group(run.dir, group_id) for (group_id,) in ledger.execute("SELECT group_id FROM groups")]


@pytest.mark.timeout(600)
def test_episodes_that_part_are_trained_on_and_the_audit_is_clean(run: FinishedRun) -> None:
    assert run.exit_code == 0, run.output
    audit = subprocess.run(command("audit", str(run.dir)), capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    last = run.lines[-1]
    assert (last["rollout/contexts_mean"], last["rollout/turns_mean"]) == (3.0, 4.0)
    assert last["environment/overridden_calls"] == last["environment/calls"] > 0
    assert last["environment/refused_calls"] == 0


def test_every_episode_has_the_contexts_that_its_program_made(run: FinishedRun) -> None:
    completions = [completion for group, _ in groups_of(run) for completion in group.completions]
    assert completions
    for completion in completions:
        assert completion.finish_reason == "stop"
        shared, parted, elsewhere = completion.contexts
        assert [value for value, _ in shared.sampled] == [1, 0, 1]
        assert [value for value, _ in parted.sampled] == [0, 1]
        assert (shared.rooted, parted.rooted, elsewhere.rooted) == (True, True, False)
        assert completion.metrics["calls"] == 4.0


def test_each_calls_tokens_were_sampled_by_the_version_that_is_recorded(run: FinishedRun) -> None:
    assert_versions_are_true(run.dir, STEPS, at_least=4)
