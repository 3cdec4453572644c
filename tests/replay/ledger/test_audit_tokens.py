"""Audit of tokens: a run of episodes is sound, and a group that isn't what was sampled is named."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from msgspec.structs import replace

from asyncdapo.messages import Completion, Group
from asyncdapo.replay.ledger.audit import audit
from tests.episodes import MadeContext
from tests.replay.run_of_episodes import run_of_episodes
from tests.replay.small_run import SmallRun, end


def test_a_run_of_episodes_is_sound(tmp_path: Path) -> None:
    assert audit(run_of_episodes(tmp_path)) == []


def another_token(episodes: list[list[MadeContext]]) -> None:
    episodes[0][0].token_ids[0] += 1


def the_same_context_twice(episodes: list[list[MadeContext]]) -> None:
    episodes[0][1:] = episodes[0][:1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (another_token, "turn 0 was sampled behind other tokens"),
        (the_same_context_twice, "one is missing, or in two places"),
    ],
)
def test_a_trained_group_of_wrong_tokens_is_named(tmp_path: Path, change, problem: str) -> None:
    [breach] = audit(run_of_episodes(tmp_path, change))
    assert breach.startswith("a group is what its tokens show: group_id 1, state trained")
    assert problem in breach


def test_a_trained_group_whose_observed_tokens_bear_loss_is_named(tmp_path: Path) -> None:
    def with_loss_everywhere(group: Group) -> Group:
        return replace(group, completions=[with_loss(completion) for completion in group.completions])

    def with_loss(completion: Completion) -> Completion:
        contexts = [replace(context, loss_mask=[(1, context.num_tokens)]) for context in completion.contexts]
        return replace(completion, contexts=contexts)

    breaches = audit(run_of_episodes(tmp_path, rewrite=with_loss_everywhere))
    assert any("the run lengths of loss_mask" in breach for breach in breaches)


@pytest.mark.parametrize("column", ["min_version", "max_version"])
def test_the_versions_of_a_group_are_those_of_its_tokens_and_not_of_its_dispatch(tmp_path: Path, column: str) -> None:
    """A ledger that says so consistently breaks no invariant of its own."""
    run = SmallRun(tmp_path)
    run.join(0)
    run.advance(0, 1)
    run.ready(0, 4)
    for lease_id in run.running(0)[:2]:
        run.answer(lease_id, versions=((0, 2), (1, 2)))
    run.train(2)
    end(run, tmp_path)
    assert audit(tmp_path) == []
    other = {"min_version": 1, "max_version": 0}[column]
    with sqlite3.connect(tmp_path / "ledger.db") as ledger:
        ledger.execute(f"UPDATE groups SET {column} = {other} WHERE step = 2")
        ledger.execute("UPDATE batches SET (staleness_max, staleness_mean) = (1 - :v, 1 - :v) WHERE step = 2", {"v": 1})
    breaches = audit(tmp_path)
    assert any("lowest and highest version and number of tokens are (0, 1, 8)" in breach for breach in breaches)
