"""float16: gradients too small for it survive by the loss scale, and a scale that is too large costs one update."""

import math
from dataclasses import replace

import pytest
import torch

from asyncdapo.errors import RunError
from asyncdapo.learner.config import LearnerConfig, LossConfig
from asyncdapo.learner.step.gradient import accumulate_gradient
from asyncdapo.learner.step.loss_scale import FIRST, NUM_GOOD, LossScale
from asyncdapo.learner.step.optimizer import Optimizer
from asyncdapo.learner.step.ranks import ALONE
from tests.learner.tiny import (
    gradient_of,
    make_batch,
    make_learner,
    make_row,
    save,
    save_tiny_llama,
    sharded,
    tiny_llama,
    train,
)


def make_optimizer(**config):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    return weight, Optimizer([weight], LearnerConfig(**{"lr": 0.1, **config}), 10, float16=True)


def step(weight, optimizer, gradient, loss=0.0):
    weight.grad = torch.tensor(gradient) * optimizer.scale.value
    return optimizer.update(loss)


def test_a_gradient_too_small_for_float16_survives_by_the_scale():
    rows = [replace(make_row(3, 9, advantage), weight=2.0**-21) for advantage in (1.0, -1.0)]

    def gradient(dtype, scale):
        policy = sharded(tiny_llama(), dtype=dtype)
        accumulate_gradient(policy, rows, LossConfig(), max_tokens=64, ranks=ALONE, scale=scale)
        return gradient_of(policy) / scale

    expected = gradient(torch.float32, 1.0)
    scaled, bare = (gradient(torch.float16, scale) for scale in (FIRST, 1.0))
    assert (scaled - expected).norm() < 0.02 * expected.norm()
    assert (bare - expected).norm() > 0.2 * expected.norm()


def test_an_overflow_halves_the_scale_and_is_no_bad_update():
    weight, optimizer = make_optimizer(max_bad_updates=1)
    for _ in range(5):
        assert step(weight, optimizer, [math.inf, 1.0]) is None
    assert weight.tolist() == [1.0, 2.0]
    assert (optimizer.num_updates, optimizer.num_bad, optimizer.scale.value) == (0, 0, FIRST / 32)
    assert step(weight, optimizer, [0.3, -0.4]) == pytest.approx(0.5)
    assert weight.tolist() == pytest.approx([0.9, 2.1])


def test_what_no_scale_mends_is_a_bad_update():
    weight, optimizer = make_optimizer(max_bad_updates=2)
    assert step(weight, optimizer, [1.0, 1.0], loss=math.nan) is None
    assert (optimizer.num_bad, optimizer.scale.value) == (1, FIRST)
    for _ in range(16):
        step(weight, optimizer, [math.nan, 1.0])
    assert (optimizer.num_bad, optimizer.scale.value) == (1, 1.0)
    step(weight, optimizer, [math.nan, 1.0])
    with pytest.raises(RunError, match="had a loss or gradient that is not finite"):
        step(weight, optimizer, [math.nan, 1.0])


def test_the_scale_doubles_after_many_updates_in_a_row_and_only_in_float16():
    scale, other = LossScale(on=True), LossScale(on=False)
    scale.overflowed()
    for _ in range(NUM_GOOD):
        assert (scale.value, other.value) == (FIRST / 2, 1.0)
        scale.fitted()
        other.fitted()
    assert (scale.value, other.value) == (FIRST, 1.0)
    assert not other.overflowed()


def test_a_resumed_learner_has_the_scale_of_its_checkpoint_if_both_are_float16(tmp_path):
    start = save_tiny_llama(tmp_path / "model")
    learner = make_learner(start, dtype="float16")
    learner._optimizer.scale.overflowed()
    assert train(learner, *make_batch())["learner/loss_scale"] == FIRST / 2
    path = save(learner, tmp_path / "run", 1)
    for dtype, value in (("float16", FIRST / 2), ("float32", 1.0)):
        resumed = make_learner(start, dtype=dtype)
        resumed.restore(path)
        assert resumed._optimizer.scale.value == value
    assert "learner/loss_scale" not in train(resumed, *make_batch(2))
