"""The loss against a naive reference in plain floats, and the cases where implementations go wrong."""

import math

import pytest
import torch

from asyncdapo.algorithm.dapo import (
    clipped_loss,
    group_advantage,
    importance_ratio,
    soft_overlong_punishment,
    token_mean_weights,
)


def naive_token_loss(logp, old_logp, advantage, clip_low, clip_high, dual_clip):
    ratio = math.exp(min(max(logp - old_logp, -20.0), 20.0))
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    loss = -min(ratio * advantage, clipped * advantage)
    if dual_clip is not None and advantage < 0:
        loss = min(loss, -advantage * dual_clip)
    return loss


def random_tokens(seed, num_rows=5, num_tokens=7):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_tokens)
    logp_BT = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    old_logp_BT = logp_BT + torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages_BT = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask_BT = torch.rand(shape, generator=generator) < 0.7
    return logp_BT, old_logp_BT, advantages_BT, mask_BT


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_agrees_with_a_naive_loop_over_tokens(seed, dual_clip):
    logp_BT, old_logp_BT, advantages_BT, mask_BT = random_tokens(seed)
    ratio_BT = importance_ratio(logp_BT, old_logp_BT, mask_BT)
    loss_BT = clipped_loss(ratio_BT, advantages_BT, mask_BT, clip_low=0.2, clip_high=0.28, dual_clip=dual_clip).loss_BT
    for row, token in mask_BT.nonzero().tolist():
        numbers = (logp_BT[row, token].item(), old_logp_BT[row, token].item(), advantages_BT[row, token].item())
        assert loss_BT[row, token].item() == pytest.approx(naive_token_loss(*numbers, 0.2, 0.28, dual_clip), rel=1e-12)
    assert not loss_BT[~mask_BT].any()


def test_parts_of_an_update_add_up_to_its_token_mean():
    logp_BT, old_logp_BT, advantages_BT, mask_BT = random_tokens(seed=3)
    loss_BT = clipped_loss(importance_ratio(logp_BT, old_logp_BT, mask_BT), advantages_BT, mask_BT).loss_BT
    weights_N = token_mean_weights(mask_BT.sum(-1))
    parts = sum(weights_N[row] * loss_BT[row].sum() for row in range(len(loss_BT)))
    torch.testing.assert_close(parts, loss_BT[mask_BT].mean())


def test_flat_tokens_and_rows_give_the_same_loss():
    logp_BT, old_logp_BT, advantages_BT, mask_BT = random_tokens(seed=4)
    loss_BT = clipped_loss(importance_ratio(logp_BT, old_logp_BT, mask_BT), advantages_BT, mask_BT).loss_BT
    logp_N, old_logp_N, advantages_N = (values_BT[mask_BT] for values_BT in (logp_BT, old_logp_BT, advantages_BT))
    mask_N = torch.ones_like(logp_N, dtype=torch.bool)
    loss_N = clipped_loss(importance_ratio(logp_N, old_logp_N, mask_N), advantages_N, mask_N).loss_BT
    assert torch.equal(loss_N, loss_BT[mask_BT])


def test_garbage_outside_the_mask_reaches_neither_loss_nor_gradient():
    mask_BT = torch.tensor([[True, False, False]])
    logp_BT = torch.tensor([[-1.0, 3e38, -3e38]], requires_grad=True)
    old_logp_BT = torch.tensor([[-1.5, -3e38, 3e38]])
    advantages_BT = torch.tensor([[0.5, 3e38, -3e38]])
    clipped = clipped_loss(importance_ratio(logp_BT, old_logp_BT, mask_BT), advantages_BT, mask_BT, dual_clip=3.0)
    clipped.loss_BT.sum().backward()
    assert clipped.loss_BT[0].tolist() == pytest.approx([-0.64, 0.0, 0.0])
    assert torch.isfinite(logp_BT.grad).all()
    assert not logp_BT.grad[0, 1:].any()
    assert clipped.clipped_high_BT.tolist() == [[True, False, False]]
    assert not clipped.clipped_low_BT.any()
    assert not clipped.clipped_dual_BT.any()


def test_an_update_without_any_token_has_loss_and_gradient_zero():
    mask_BT = torch.zeros(2, 3, dtype=torch.bool)
    logp_BT = torch.full((2, 3), -1.0, requires_grad=True)
    ratio_BT = importance_ratio(logp_BT, torch.zeros(2, 3), mask_BT)
    weights_B = token_mean_weights(mask_BT.sum(-1))
    loss = (weights_B[:, None] * clipped_loss(ratio_BT, torch.ones(2, 1), mask_BT).loss_BT).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert not logp_BT.grad.any()


def test_on_policy_the_gradient_of_a_token_is_minus_its_advantage():
    logp_BT = torch.tensor([[-0.3, -2.0]], dtype=torch.float64, requires_grad=True)
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    advantages_BT = torch.tensor([[0.7, -1.2]], dtype=torch.float64)
    ratio_BT = importance_ratio(logp_BT, logp_BT.detach(), mask_BT)
    clipped_loss(ratio_BT, advantages_BT, mask_BT).loss_BT.sum().backward()
    assert logp_BT.grad[0].tolist() == pytest.approx([-0.7, 1.2])


def test_a_token_counts_the_same_in_a_short_and_a_long_completion():
    assert token_mean_weights(torch.tensor([1, 7, 0])).tolist() == [0.125] * 3
    assert token_mean_weights(torch.tensor([0, 0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [-1.0], [1e8, 1e8]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_that_is_constant_or_alone_has_advantage_exactly_zero(rewards, dtype):
    assert group_advantage(torch.tensor(rewards, dtype=dtype)).tolist() == [0.0] * len(rewards)


def test_a_large_offset_leaves_the_advantage_as_it_is():
    rewards_G = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(group_advantage(rewards_G + 1e6), group_advantage(rewards_G))


def test_the_advantage_divides_by_the_unbiased_standard_deviation():
    rewards_G = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    assert group_advantage(rewards_G, eps=0.0).tolist() == pytest.approx([2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5])


def naive_punishment(length, max_length, buffer):
    """Eq. 13, line by line."""
    if length <= max_length - buffer:
        return 0.0
    if length <= max_length:
        return ((max_length - buffer) - length) / buffer
    return -1.0


@pytest.mark.parametrize("buffer", [0, 1, 4, 16])
def test_the_punishment_has_the_three_stages_of_the_paper(buffer):
    lengths_N = torch.arange(20)
    punishments = soft_overlong_punishment(lengths_N, max_length=16, buffer=buffer, penalty=0.3)
    naive = [0.3 * naive_punishment(length, 16, buffer) for length in lengths_N.tolist()]
    assert punishments.tolist() == pytest.approx(naive, abs=1e-15)


def test_no_punishment_is_a_plain_zero():
    assert str(soft_overlong_punishment(torch.tensor([3, 12]), max_length=16, buffer=4, penalty=1.0).tolist()) == (
        "[0.0, 0.0]"
    )
