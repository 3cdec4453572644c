"""Warm-up, clipping, and updates that go wrong."""

import math

import pytest
import torch

from asyncdapo.errors import RunError
from asyncdapo.learner.config import LearnerConfig
from asyncdapo.learner.step.optimizer import BAD_WINDOW, Optimizer


def make_optimizer(num_steps=10, **config):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    return weight, Optimizer([weight], LearnerConfig(**{"lr": 0.1, **config}), num_steps)


def test_the_learning_rate_rises_linearly_and_stays():
    weight, optimizer = make_optimizer(warmup_steps=4)
    rates = []
    for _ in range(6):
        rates.append(optimizer.lr)
        weight.grad = torch.ones(2)
        optimizer.update(loss=0.0)
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ("linear", [0.05, 0.1, 0.1, 0.075, 0.05, 0.025, 0.0]),
        ("cosine", [0.05, 0.1, 0.1, 0.05 + 0.05 * 0.5**0.5, 0.05, 0.05 - 0.05 * 0.5**0.5, 0.0]),
    ],
)
def test_after_warm_up_the_learning_rate_falls_to_nothing_at_the_end_of_the_run(schedule, expected):
    weight, optimizer = make_optimizer(num_steps=3, updates_per_step=2, warmup_steps=2, lr_schedule=schedule)
    rates = []
    for _ in expected:  # one more than the run has
        rates.append(optimizer.lr)
        weight.grad = torch.ones(2)
        optimizer.update(loss=0.0)
    assert rates == pytest.approx(expected)


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
    assert not optimizer.averages()


def feed(weight, optimizer, losses):
    for loss in losses:
        weight.grad = torch.ones(2)
        optimizer.update(loss)


def test_more_bad_updates_than_allowed_among_the_last_ones_end_the_run():
    weight, optimizer = make_optimizer(max_bad_updates=2)
    feed(weight, optimizer, [math.nan, 0.0, math.nan])
    with pytest.raises(RunError, match="3 of the last 4 optimizer updates .* learner.max_bad_updates is 2"):
        feed(weight, optimizer, [math.nan])


def test_bad_updates_far_apart_do_not_add_up_over_a_run():
    weight, optimizer = make_optimizer(max_bad_updates=1)
    for _ in range(5):
        feed(weight, optimizer, [math.nan] + [0.0] * (BAD_WINDOW - 1))
    assert optimizer.num_bad == 5
    feed(weight, optimizer, [math.nan] + [0.0] * (BAD_WINDOW - 2))
    with pytest.raises(RunError, match=f"2 of the last {BAD_WINDOW} optimizer updates"):
        feed(weight, optimizer, [math.nan])


def test_the_window_continues_after_a_restore():
    weight, optimizer = make_optimizer(max_bad_updates=1)
    feed(weight, optimizer, [math.nan] + [0.0] * 3)
    state = optimizer.state_dict()
    weight, restored = make_optimizer(max_bad_updates=1)
    restored.load_state_dict(state)
    with pytest.raises(RunError, match="2 of the last 5 optimizer updates"):
        feed(weight, restored, [math.nan])
