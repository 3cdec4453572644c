"""The staleness study: its harder task, and its tables."""

from __future__ import annotations

from statistics import mean

import pytest

from asyncdapo.shares import Batch, Dealer
from benchmarks.staleness import make_learner
from benchmarks.staleness_study import report
from benchmarks.staleness_study.long_chains import LongChains
from benchmarks.staleness_study.sampler import Sampler


def line(method: str, staleness: int, last: float, seed: int = 0) -> dict:
    return {
        "task": "chain",
        "method": method,
        "staleness": staleness,
        "seed": seed,
        "steps": [0.0, 8.0, 16.0],
        "seconds": [0.0, 10.0, 20.0],
        "accuracy": [0.4, 0.8, last],
        "ess": [1.0, 0.5],
        "clip_low_ratio": [0.0, 0.01],
        "clip_high_ratio": [0.0, 0.02],
        "k3": [0.0, 0.003],
        "kept_ratio": [0.6, 0.4],
    }


def test_long_chains_are_the_same_at_each_call_and_none_is_both_trained_on_and_held_out() -> None:
    task, rows = LongChains(seed=3), range(300)
    training, held_out = ({ask(row).text for row in rows} for ask in (task.question_at, task.eval_question_at))
    assert training == {LongChains(seed=3).question_at(row).text for row in rows}
    assert held_out == {LongChains(seed=4).eval_question_at(row).text for row in rows}
    assert not training & held_out
    assert 11 < mean(sum(text.count(sign) for sign in "+-*") for text in training) < 13


def test_the_matrix_has_the_least_and_the_most_of_several_seeds_and_says_where_there_is_none() -> None:
    lines = [line("ppo", 0, 0.96), line("ppo", 16, 0.8), line("ppo", 16, 0.7, seed=1), line("tis", 16, 0.9)]
    assert report.matrix(lines, ("ppo", "tis"), (0, 16)).splitlines()[2:] == [
        "| ppo | .960 | .750 (.700–.800) |",
        "| tis | – | .900 |",
    ]


def test_a_cell_has_the_seconds_to_the_goal_and_what_its_last_third_measured() -> None:
    lines = [line("ppo", 0, 1.0), line("tis", 16, 0.89)]
    rows = [row.strip("| ").split(" | ") for row in report.cells(lines, ("ppo", "tis"), (0, 16)).splitlines()[2:]]
    assert rows == [
        ["0", "ppo", ".800", "1.000", "15", "20", ".500", ".030", "0.003", ".400"],
        ["16", "tis", ".800", ".890", "never", "20", ".500", ".030", "0.003", ".400"],
    ]


@pytest.mark.soak
def test_a_batch_of_the_study_can_be_trained_on_and_its_weights_measured() -> None:
    sampler = Sampler("chain", seed=0, num_eval=8)
    first = sampler.batch(1, 0, 0)
    config = sampler.config
    assert len(first.groups) == config.replay.prompts_per_step
    learner = make_learner(config, staleness=0)
    batch = Batch(step=1, branch=0, max_staleness=0, groups=first.groups, deal=Dealer().deal(first.groups))
    learner.train(learner.prepare(batch, first.payloads))
    sampler.load(1, {name: tensor.detach().clone() for name, tensor in learner.weights().items()})
    assert 0 <= sampler.accuracy(1, 8) <= 1
    assert sampler.batch(2, first.next_prompt, 1).next_prompt > first.next_prompt
    sampler.stop()
