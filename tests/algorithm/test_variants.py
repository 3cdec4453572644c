"""Ratios of others against naive references in plain floats."""

import math

import pytest
import torch

from asyncdapo.algorithm.dapo import clipped_loss, importance_ratio
from asyncdapo.algorithm.policy_loss import policy_loss
from asyncdapo.algorithm.variants import response_ratio
from tests.algorithm.test_dapo import naive_token_loss, random_tokens

CLIPS = {"clip_low": 0.2, "clip_high": 0.28}


def mean_log_ratio(logp, old_logp):
    return sum(new - old for new, old in zip(logp, old_logp, strict=True)) / max(1, len(logp))


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_ppo_is_the_loss_of_the_paper(dual_clip):
    logp_BT, old_logp_BT, advantages_BT, mask_BT = random_tokens(seed=0)
    policy = policy_loss("ppo", logp_BT, old_logp_BT, advantages_BT, mask_BT, dual_clip=dual_clip, **CLIPS)
    ratio_BT = importance_ratio(logp_BT, old_logp_BT, mask_BT)
    clipped = clipped_loss(ratio_BT, advantages_BT, mask_BT, dual_clip=dual_clip, **CLIPS)
    assert torch.equal(policy.ratio_BT, ratio_BT)
    assert all(torch.equal(getattr(policy, name), values) for name, values in vars(clipped).items())


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_gspo_judges_every_token_by_the_geometric_mean_of_its_response(seed, dual_clip):
    logp_BT, old_logp_BT, advantages_BT, mask_BT = random_tokens(seed)
    policy = policy_loss("gspo", logp_BT, old_logp_BT, advantages_BT, mask_BT, dual_clip=dual_clip, **CLIPS)
    for row, token in mask_BT.nonzero().tolist():
        mask_T = mask_BT[row]
        log_ratio = mean_log_ratio(logp_BT[row][mask_T].tolist(), old_logp_BT[row][mask_T].tolist())
        assert policy.ratio_BT[row, token].item() == pytest.approx(math.exp(log_ratio))
        naive = naive_token_loss(log_ratio, 0.0, advantages_BT[row, token].item(), 0.2, 0.28, dual_clip)
        assert policy.loss_BT[row, token].item() == pytest.approx(naive)
    assert not policy.ratio_BT[~mask_BT].any()


def test_under_gspo_every_token_of_a_response_gets_the_gradient_of_its_ratio():
    logp_BT, old_logp_BT, _, mask_BT = random_tokens(seed=1)
    old_logp_BT = logp_BT + 0.01 * (old_logp_BT - logp_BT)
    logp_BT.requires_grad_()
    advantages_B1 = torch.tensor([[0.5], [-1.0], [2.0], [0.3], [-0.2]], dtype=torch.float64)
    policy = policy_loss("gspo", logp_BT, old_logp_BT, advantages_B1, mask_BT, **CLIPS)
    policy.loss_BT.sum().backward()
    torch.testing.assert_close(logp_BT.grad, torch.where(mask_BT, -advantages_B1 * policy.ratio_BT.detach(), 0.0))


@pytest.mark.parametrize("seed", range(3))
def test_cispo_weighs_the_log_prob_by_the_clipped_ratio_and_clips_no_gradient(seed):
    logp_BT, old_logp_BT, advantages_BT, mask_BT = random_tokens(seed)
    logp_BT.requires_grad_()
    policy = policy_loss("cispo", logp_BT, old_logp_BT, advantages_BT, mask_BT, **CLIPS)
    policy.loss_BT.sum().backward()
    for row, token in mask_BT.nonzero().tolist():
        ratio = math.exp(logp_BT[row, token].item() - old_logp_BT[row, token].item())
        weight = min(max(ratio, 0.8), 1.28) * advantages_BT[row, token].item()
        assert policy.loss_BT[row, token].item() == pytest.approx(-weight * logp_BT[row, token].item())
        assert logp_BT.grad[row, token].item() == pytest.approx(-weight)
        assert policy.clipped_low_BT[row, token].item() == (ratio < 0.8)
        assert policy.clipped_high_BT[row, token].item() == (ratio > 1.28)
    assert not policy.clipped_dual_BT.any()


def test_cispo_with_a_lower_width_of_1_is_bounded_from_above_only():
    logp_BT, mask_BT = torch.tensor([[-9.0]]), torch.tensor([[True]])
    policy = policy_loss("cispo", logp_BT, torch.tensor([[-1.0]]), torch.ones(1, 1), mask_BT, clip_low=1, clip_high=4)
    assert policy.loss_BT.item() == pytest.approx(9 * math.exp(-8))
    assert not policy.clipped_low_BT.any()


def test_the_ratio_of_a_response_is_the_product_of_its_tokens_ratios():
    logp_BT = torch.tensor([[-1.0, -2.0, 50.0]], dtype=torch.float64)
    old_logp_BT = torch.tensor([[-1.5, -1.0, -50.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, False]])
    product = response_ratio(logp_BT, old_logp_BT, mask_BT, geometric=False)
    geometric = response_ratio(logp_BT, old_logp_BT, mask_BT, geometric=True)
    assert (product.item(), geometric.item()) == pytest.approx((math.exp(-0.5), math.exp(-0.25)))
