"""Checkpoints that all ranks write, and learners of other numbers of ranks and shards that resume from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asyncdapo.errors import RunError
from asyncdapo.learner.step.ranks import Ranks
from asyncdapo.learner.storage.checkpoint import (
    Piece,
    begin_checkpoint,
    check_checkpoint,
    checkpoint_dir,
    commit_checkpoint,
    find_checkpoint,
    unfinished_dir,
)
from tests.learner.ranks import in_processes, with_shards
from tests.learner.tiny import make_batch, make_exact_learner, make_learner, save_tiny_llama, train

CONFIG = {"warmup_steps": 3, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def train_on(ranks: Ranks, path: str, run_dir: Path, num_shards: int, step: int) -> tuple[float, dict, list[Piece]]:
    """One train step behind the checkpoint of the step before: its loss, the weights, and what this rank wrote."""
    ranks = with_shards(ranks, num_shards) if ranks.num_ranks > 1 else ranks
    learner = make_exact_learner(path, ranks=ranks, **CONFIG)
    if step > 1:
        learner.restore(checkpoint_dir(run_dir, step - 1))
    loss = train(learner, *make_batch(step, seed=step))["learner/loss"]
    if ranks.rank == 0:
        begin_checkpoint(run_dir, step)
    ranks.largest(0)
    return loss, learner.weights(), learner.copy().write(run_dir, step)


def written(outcomes: list[tuple[float, dict, list[Piece]]]) -> list[Piece]:
    return [piece for _, _, pieces in outcomes for piece in pieces]


def test_a_run_resumed_on_other_ranks_and_shards_has_the_losses_of_one_that_never_stopped(path, tmp_path) -> None:
    straight = make_exact_learner(path, **CONFIG)
    expected = [train(straight, *make_batch(step, seed=step))["learner/loss"] for step in (1, 2, 3)]
    losses = []
    for step, (num_ranks, num_shards) in enumerate([(2, 2), (4, 2), (1, 1)], 1):
        alone = num_ranks == 1
        work = (path, tmp_path, num_shards, step)
        outcomes = [train_on(Ranks(), *work)] if alone else in_processes(num_ranks, train_on, *work)
        for outcome in outcomes:
            assert isinstance(outcome, tuple), outcome
        commit_checkpoint(tmp_path, step, 0, written(outcomes), num_ranks=num_ranks, num_shards=num_shards)
        saved = load_file(checkpoint_dir(tmp_path, step) / "model.safetensors")
        assert all(torch.equal(saved[name], weight) for name, weight in outcomes[0][1].items())
        assert saved.keys() == outcomes[0][1].keys()
        losses.append(outcomes[0][0])
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, weight in straight.weights().items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-6)


def test_a_checkpoint_that_lacks_what_a_rank_should_have_written_gets_no_name(path, tmp_path) -> None:
    outcomes = in_processes(2, train_on, path, tmp_path, 2, 1)
    of_first = outcomes[0][2]
    with pytest.raises(
        RunError, match=r"checkpoint of step 1 was not written whole: .*model.safetensors was written by"
    ):
        commit_checkpoint(tmp_path, 1, 0, of_first, num_ranks=2, num_shards=2)
    assert not checkpoint_dir(tmp_path, 1).exists()
    twice = [
        *written(outcomes),
        next(piece for piece in of_first if piece.file == "model.safetensors" and piece.offset),
    ]
    with pytest.raises(RunError, match="by nobody, or more than once"):
        commit_checkpoint(tmp_path, 1, 0, twice, num_ranks=2, num_shards=2)
    commit_checkpoint(tmp_path, 1, 0, written(outcomes), num_ranks=2, num_shards=2)
    assert check_checkpoint(checkpoint_dir(tmp_path, 1)) == []


@pytest.mark.parametrize("name", ["model.safetensors", "exp_avg/model.safetensors", "learner.pt"])
def test_a_file_of_another_save_is_named_and_the_checkpoint_before_is_used(path, tmp_path, name) -> None:
    learner = make_learner(path)
    for step in (1, 2):
        train(learner, *make_batch(step, seed=step))
        begin_checkpoint(tmp_path, step)
        commit_checkpoint(tmp_path, step, 0, learner.copy().write(tmp_path, step))
    old, new = (checkpoint_dir(tmp_path, step) / name for step in (1, 2))
    mixed = bytearray(new.read_bytes())
    half = len(mixed) // 2
    mixed[half:] = old.read_bytes()[half : len(mixed)]
    new.write_bytes(mixed)
    found = find_checkpoint(tmp_path, {1: 0, 2: 0})
    assert found.step == 1
    assert found.problems == [f"step-000002: {name} is damaged (another sha256 than was written)"]


def test_training_continues_while_a_copy_is_written_and_the_copy_stays_what_it_was(path, tmp_path) -> None:
    learner = make_learner(path)
    train(learner, *make_batch(1))
    before = {name: weight.clone() for name, weight in learner.weights().items()}
    copied = learner.copy()
    train(learner, *make_batch(2))
    begin_checkpoint(tmp_path, 1)
    commit_checkpoint(tmp_path, 1, 0, copied.write(tmp_path, 1))
    assert not unfinished_dir(tmp_path, 1).exists()
    assert copied.num_bytes == 0, "its memory is freed"
    restored = make_learner(path)
    restored.restore(checkpoint_dir(tmp_path, 1))
    assert restored.version == 1
    assert all(torch.equal(restored.weights()[name], weight) for name, weight in before.items())
