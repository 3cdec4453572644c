"""Warm-up, clipping, and updates that go wrong."""

import math

import pytest
import torch

from asyncdapo.errors import RunError
from asyncdapo.learner.config import LearnerConfig
from asyncdapo.learner.optimizer import Optimizer


def make_optimizer(**config):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    return weight, Optimizer([weight], LearnerConfig(**{"lr": 0.1, **config}))


def test_the_learning_rate_rises_linearly_and_stays():
    weight, optimizer = make_optimizer(warmup_steps=4)
    rates = []
    for _ in range(6):
        rates.append(optimizer.lr)
        weight.grad = torch.ones(2)
        optimizer.update(loss=0.0)
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_an_update_moves_the_weights_by_the_learning_rate_of_that_update():
    weight, optimizer = make_optimizer(warmup_steps=2)
    weight.grad = torch.tensor([0.3, -0.3])
    assert optimizer.update(loss=0.0) == pytest.approx(0.3 * 2**0.5)
    assert weight.tolist() == pytest.approx([0.95, 2.05])
    assert weight.grad is None


def test_a_gradient_above_the_largest_norm_is_scaled_down_to_it():
    (small, large), steps = (1.0, 1000.0), []
    for scale in (small, large):
        weight, optimizer = make_optimizer(grad_clip=1.0, eps=1.0)
        weight.grad = torch.tensor([0.6, 0.8]) * scale
        assert optimizer.update(loss=0.0) == pytest.approx(scale)
        steps.append(weight.tolist())
    assert steps[0] == pytest.approx(steps[1])


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (0.0, math.nan), (0.0, math.inf)])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(loss, gradient):
    weight, optimizer = make_optimizer()
    weight.grad = torch.tensor([1.0, gradient])
    assert optimizer.update(loss) is None
    assert weight.tolist() == [1.0, 2.0]
    assert weight.grad is None
    assert (optimizer.num_updates, optimizer.num_bad) == (0, 1)
    assert not optimizer.state_dict()["adamw"]["state"]


def test_more_bad_updates_than_allowed_in_the_whole_run_end_it():
    weight, optimizer = make_optimizer(max_bad_updates=2)
    for loss in (math.nan, 0.0, math.nan):
        weight.grad = torch.ones(2)
        optimizer.update(loss)
    weight.grad = torch.ones(2)
    with pytest.raises(RunError, match="3 optimizer updates .* learner.max_bad_updates is 2"):
        optimizer.update(math.nan)
