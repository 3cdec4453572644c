"""A learner and its checkpoints: readable by Hugging Face, refused when damaged, and good to resume from, bit for
bit."""

import os
import signal

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncdapo.errors import RunError
from asyncdapo.learner.storage.checkpoint import MANIFEST, Manifest, find_checkpoint
from tests.learner.ranks import die, spawned
from tests.learner.tiny import MEASURED, make_batch, make_learner, save, save_tiny_llama, train


def names(run_dir):
    return sorted(os.listdir(run_dir / "checkpoints"))


def digests(path):
    """Of every file of a checkpoint, the learner's own state among them."""
    manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    return {(piece.file, piece.offset): piece.sha256 for piece in manifest.pieces}


def same_weights(one, other):
    return all(torch.equal(other.weights()[name], weight) for name, weight in one.weights().items())


def test_hugging_face_loads_a_checkpoint_with_the_weights_of_the_learner(tmp_path):
    learner = make_learner(save_tiny_llama(tmp_path / "model"), keep_checkpoints=1)
    save(learner, tmp_path / "run", 0)
    train(learner, *make_batch())
    save(learner, tmp_path / "run", 1)
    train(learner, *make_batch(step=2))
    path = save(learner, tmp_path / "run", 2)
    assert names(tmp_path / "run") == ["step-000000", "step-000002"]
    assert (path / "tokenizer.json").read_text() == (tmp_path / "model/tokenizer.json").read_text()
    saved = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in learner.weights().items())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_restored_learner_resumes_bit_for_bit(tmp_path, dtype):
    config = {"warmup_steps": 5, "updates_per_step": 2, "weight_decay": 0.1, "dtype": dtype}
    start = save_tiny_llama(tmp_path / "model")
    straight = make_learner(start, **config)
    for step in (1, 2):
        train(straight, *make_batch(step, seed=step))
    torch.rand(3)  # moves the random state on from the seed
    path = save(straight, tmp_path / "run", 2)
    random_number = torch.rand(1)
    expected = [train(straight, *make_batch(step, seed=step)) for step in (3, 4)]

    restored = make_learner(start, **config)
    restored.logprobs(0, [(np.array([1, 2], np.int32), np.array([3], np.int32), None)])  # gathers the weights of before
    restored.restore(path)
    assert restored.version == 2
    assert torch.equal(torch.rand(1), random_number)
    got = [train(restored, *make_batch(step, seed=step)) for step in (3, 4)]
    for before, after in zip(expected, got, strict=True):
        assert {**before, **dict.fromkeys(MEASURED)} == {**after, **dict.fromkeys(MEASURED)}
    assert same_weights(straight, restored)
    one, other = (digests(save(learner, tmp_path / name, 4)) for name, learner in (("a", straight), ("b", restored)))
    assert one == other


def test_a_resumed_run_has_the_learning_rates_of_an_uninterrupted_one(tmp_path):
    config = {"num_steps": 6, "warmup_steps": 3, "updates_per_step": 2, "lr_schedule": "cosine"}
    start = save_tiny_llama(tmp_path / "model")

    def rates(learner, steps):
        return [train(learner, *make_batch(step, seed=step))["learner/lr"] for step in steps]

    straight = rates(make_learner(start, **config), range(1, 7))
    learner, resumed = make_learner(start, **config), []
    for step in range(1, 7):  # killed after every step
        resumed += rates(learner, [step])
        path = save(learner, tmp_path / "run", step)
        learner = make_learner(start, **config)
        learner.restore(path)
    assert resumed == straight
    assert len(set(straight)) == 6
    assert straight[-1] < 0.2 * max(straight)


def test_a_checkpoint_is_a_model_path(tmp_path):
    learner = make_learner(save_tiny_llama(tmp_path / "model"))
    train(learner, *make_batch())
    path = save(learner, tmp_path / "run", 1)
    assert same_weights(learner, make_learner(str(path)))


def spoil(batch, payload):
    """A batch whose update is skipped."""
    payload.logprobs.fill(float("nan"))
    return batch, payload


def test_skipped_updates_still_count_after_a_restore(tmp_path):
    start = save_tiny_llama(tmp_path / "model")
    learner = make_learner(start, max_bad_updates=1)
    train(learner, *spoil(*make_batch()))
    path = save(learner, tmp_path / "run", 1)
    restored = make_learner(start, max_bad_updates=1)
    restored.restore(path)
    with pytest.raises(RunError, match=r"2 of the last 2 optimizer updates .* learner.max_bad_updates is 1"):
        train(restored, *spoil(*make_batch(step=2)))


def test_settings_of_the_optimizer_are_those_of_the_launch_that_resumes(tmp_path):
    start = save_tiny_llama(tmp_path / "model")
    learner = make_learner(start, lr=1e-3, weight_decay=0.0)
    train(learner, *make_batch())
    path = save(learner, tmp_path / "run", 1)
    learners = [make_learner(start, lr=lr, weight_decay=decay) for lr, decay in ((1e-3, 0.0), (2e-3, 0.0), (1e-3, 0.5))]
    for other in learners:
        other.restore(path)
        train(other, *make_batch(step=2))
    same, faster, decayed = learners
    assert not same_weights(same, faster)
    assert not same_weights(same, decayed)


@pytest.mark.parametrize("name", ["model.safetensors", "learner.pt"])
@pytest.mark.parametrize("flipped", [True, False])
def test_a_damaged_file_is_named_and_leaves_the_learner_as_it_was(tmp_path, name, flipped):
    start = save_tiny_llama(tmp_path / "model")
    learner = make_learner(start)
    train(learner, *make_batch())
    path = save(learner, tmp_path / "run", 1)
    content = bytearray((path / name).read_bytes())
    content[-len(content) // 3] ^= 4
    (path / name).write_bytes(content if flipped else content[:-100])
    other, untouched = make_learner(start), make_learner(start)
    with pytest.raises(RunError, match=f"step-000001 can't be used: {name}"):
        other.restore(path)
    assert other.version == 0
    assert same_weights(other, untouched)


def die_while_it_saves(start, run_dir):
    learner = make_learner(start)
    train(learner, *make_batch())
    save(learner, run_dir, 1)
    train(learner, *make_batch(step=2))
    torch.save = lambda state, file: (file.write(b"half"), file.flush(), die())
    save(learner, run_dir, 2)


def test_a_learner_killed_while_it_saves_resumes_from_the_checkpoint_before(tmp_path):
    start, run_dir = save_tiny_llama(tmp_path / "model"), tmp_path / "run"
    killed = spawned.Process(target=die_while_it_saves, args=(start, run_dir))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert names(run_dir) == [".step-000002.new", "step-000001"]
    step, path, problems = find_checkpoint(run_dir, {1: 0, 2: 0})
    assert (step, problems) == (1, [])
    learner = make_learner(start)
    learner.restore(path)
    train(learner, *make_batch(step=2))
    save(learner, run_dir, 2)
    assert names(run_dir) == ["step-000001", "step-000002"]
