"""Audit of tokens: a run of episodes is sound, and a group that isn't what was sampled is named."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from asyncdapo.messages import Completion, Group
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.replay.server.validate import arrival
from tests.episodes import Episodes, MadeContext
from tests.replay.small_run import GROUP_SIZE, SmallRun, end


def run_of_episodes(run_dir: Path, change=lambda episodes: None, rewrite=lambda group: group) -> Path:
    """Two trained steps. `change` may harm the first group before it is sent, and `rewrite` every header."""
    run = SmallRun(run_dir)
    run.join(0)
    for step in (1, 2):
        run.ready(0, 4)
        for lease_id in run.running(0)[:2]:
            prompt_id = run.leases[lease_id].prompt.prompt_id
            group, payload = Episodes(lease_id, versions=(step - 1, step - 1)).group(
                prompt_id, group_size=GROUP_SIZE, change=change if lease_id == 1 else list, lease_id=lease_id
            )
            run.dispatch.apply(arrival(group), arrived=(rewrite(group), payload))
            run.messages()
        run.train(step)
    return end(run, run_dir)


def test_a_run_of_episodes_is_sound(tmp_path: Path) -> None:
    assert audit(run_of_episodes(tmp_path)) == []


def another_token(episodes: list[list[MadeContext]]) -> None:
    episodes[0][0].token_ids[0] += 1


def the_same_context_twice(episodes: list[list[MadeContext]]) -> None:
    episodes[0][1:] = episodes[0][:1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (another_token, "a turn was sampled behind other tokens"),
        (the_same_context_twice, "sampled tokens are in two contexts"),
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


def test_every_token_of_the_runs_has_a_log_prob_of_its_own() -> None:
    """Else equal tokens of two contexts would count as one."""
    _, payload = Episodes(3).group()
    assert len(np.unique(payload.logprobs)) == len(payload.logprobs)
