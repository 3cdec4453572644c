"""Checkpoints: whole or absent, the newest kept, readable by Hugging Face, and good to go on from bit for bit."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncdapo.learner.checkpoint import remove_old_checkpoints, write_checkpoint
from tests.learner.tiny import make_batch, make_learner, save_tiny_llama


def write_note(text):
    return lambda directory: (directory / "note").write_text(text)


def names(run_dir):
    return sorted(os.listdir(run_dir / "checkpoints"))


def test_a_checkpoint_whose_writing_fails_never_appears(tmp_path):
    def fail(directory):
        write_note("half")(directory)
        raise OSError("disk full")

    write_checkpoint(tmp_path, 4, write_note("four"))
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, 8, fail)
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["step-000004"]
    write_checkpoint(tmp_path, 8, write_note("eight"))
    assert names(tmp_path) == ["step-000004", "step-000008"]
    assert (tmp_path / "checkpoints/step-000008/note").read_text() == "eight"


def test_a_checkpoint_has_no_name_while_it_is_written(tmp_path):
    seen = []
    write_checkpoint(tmp_path, 4, lambda directory: seen.extend(names(tmp_path)))
    assert [name for name in seen if not name.startswith(".")] == []
    assert names(tmp_path) == ["step-000004"]


def test_writing_the_same_step_again_replaces_it(tmp_path):
    for text in ("old", "new"):
        path = write_checkpoint(tmp_path, 12, write_note(text))
    assert (path / "note").read_text() == "new"
    assert names(tmp_path) == ["step-000012"]


@pytest.mark.parametrize(("keep", "kept"), [(1, [0, 30]), (2, [0, 20, 30]), (9, [0, 10, 20, 30]), (0, [0, 10, 20, 30])])
def test_step_zero_and_the_newest_are_kept(tmp_path, keep, kept):
    for step in (0, 10, 20, 30):
        write_checkpoint(tmp_path, step, write_note(str(step)))
    remove_old_checkpoints(tmp_path, keep)
    assert names(tmp_path) == [f"step-{step:06d}" for step in kept]


def test_steps_past_six_digits_stay_in_order(tmp_path):
    for step in (999_999, 1_000_000):
        write_checkpoint(tmp_path, step, write_note(str(step)))
    remove_old_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["step-1000000"]


def test_hugging_face_loads_a_checkpoint_with_the_weights_of_the_learner(tmp_path):
    learner = make_learner(save_tiny_llama(tmp_path / "model"), keep_checkpoints=1)
    learner.save(tmp_path / "run", 0)
    learner.train(*make_batch())
    learner.save(tmp_path / "run", 1)
    learner.train(*make_batch(step=2))
    path = learner.save(tmp_path / "run", 2)
    assert names(tmp_path / "run") == ["step-000000", "step-000002"]
    assert (path / "tokenizer.json").read_text() == (tmp_path / "model/tokenizer.json").read_text()
    saved = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in learner.weights().items())


def test_a_restored_learner_goes_on_bit_for_bit(tmp_path):
    config = {"warmup_steps": 5, "updates_per_step": 2, "weight_decay": 0.1}
    start = save_tiny_llama(tmp_path / "model")
    straight = make_learner(start, **config)
    for step in (1, 2):
        straight.train(*make_batch(step, seed=step))
    torch.rand(3)  # moves the random state on from the seed
    path = straight.save(tmp_path / "run", 2)
    random_number = torch.rand(1)
    expected = [straight.train(*make_batch(step, seed=step)) for step in (3, 4)]

    restored = make_learner(start, **config)
    restored.restore(path)
    assert restored.version == 2
    assert torch.equal(torch.rand(1), random_number)
    got = [restored.train(*make_batch(step, seed=step)) for step in (3, 4)]
    for before, after in zip(expected, got, strict=True):
        assert {**before, "learner/train_s": 0} == {**after, "learner/train_s": 0}
    for name, weight in straight.weights().items():
        assert torch.equal(restored.weights()[name], weight)


def test_a_checkpoint_is_a_model_path(tmp_path):
    learner = make_learner(save_tiny_llama(tmp_path / "model"))
    learner.train(*make_batch())
    path = learner.save(tmp_path / "run", 1)
    other = make_learner(str(path))
    for name, weight in learner.weights().items():
        assert torch.equal(other.weights()[name], weight)
