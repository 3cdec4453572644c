"""What holds of every loss: nothing outside the mask counts, nothing overflows, and nothing hides a NaN."""

import math

import pytest
import torch

from asyncdapo.algorithm.policy_loss import VARIANTS, policy_loss
from asyncdapo.learner.config import VARIANTS as IN_CONFIG
from asyncdapo.learner.config import LossConfig
from tests.algorithm.test_dapo import random_tokens

GIVEN = {"gspo": {"clip_low": 0.2, "clip_high": 0.28}, "estr": {"estr_threshold": 0.5}}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def loss_of(variant, logp_BT, old_logp_BT, advantages_BT, mask_BT, entropy_BT=None):
    """As the learner calls it; the mask of M2PO leaves every second token."""
    numbers = LossConfig(variant=variant, **GIVEN.get(variant, {})).numbers
    if variant == "estr":
        numbers["entropy_BT"] = torch.ones_like(logp_BT) if entropy_BT is None else entropy_BT
    if variant == "m2po":
        numbers["trusted_BT"] = (torch.arange(mask_BT.shape[-1]) % 2 == 0).expand_as(mask_BT)
    return policy_loss(variant, logp_BT, old_logp_BT, advantages_BT, mask_BT, **numbers)


def test_the_config_knows_every_loss_and_what_it_is_called_with():
    assert VARIANTS.keys() == IN_CONFIG.keys()


@each_variant
def test_garbage_outside_the_mask_reaches_nothing(variant):
    logp_BT, old_logp_BT, advantages_BT, mask_BT = (values.float() for values in random_tokens(seed=5))
    mask_BT = mask_BT.bool()
    garbage_BT = torch.where(torch.arange(mask_BT.shape[1]) % 2 == 0, 3e38, -3e38).expand(mask_BT.shape)

    def differentiated(logp_BT, old_logp_BT, advantages_BT, entropy_BT):
        logp_BT = logp_BT.clone().requires_grad_()
        policy = loss_of(variant, logp_BT, old_logp_BT, advantages_BT, mask_BT, entropy_BT)
        policy.loss_BT.sum().backward()
        return [*(values for values in vars(policy).values() if values is not None), logp_BT.grad]

    tokens = (logp_BT, old_logp_BT, advantages_BT, torch.ones_like(logp_BT))
    clean = differentiated(*(torch.where(mask_BT, values, 0.0) for values in tokens))
    garbage = (garbage_BT, -garbage_BT, garbage_BT, garbage_BT)
    dirty = differentiated(*(torch.where(mask_BT, v, bad) for v, bad in zip(tokens, garbage, strict=True)))
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))
    assert all(torch.isfinite(values).all() and not values[~mask_BT].any() for values in dirty)


@each_variant
def test_a_response_without_a_token_has_no_loss_and_no_gradient(variant):
    logp_BT = torch.full((1, 3), -1.0, requires_grad=True)
    mask_BT = torch.zeros(1, 3, dtype=torch.bool)
    policy = loss_of(variant, logp_BT, torch.zeros(1, 3), torch.ones(1, 1), mask_BT)
    policy.loss_BT.sum().backward()
    assert not policy.loss_BT.any()
    assert not logp_BT.grad.any()


@each_variant
def test_a_ratio_beyond_the_clamp_is_finite(variant):
    logp_BT = torch.tensor([[-1.0, -1000.0]])
    for advantage in (1.0, -1.0):
        mask_BT = torch.ones(1, 2).bool()
        policy = loss_of(variant, logp_BT, logp_BT.flip(-1) * 3, torch.full((1, 1), advantage), mask_BT)
        assert torch.isfinite(policy.ratio_BT).all()
        assert torch.isfinite(policy.loss_BT).all()
        assert policy.ratio_BT.max() <= math.exp(20) * 1.001


@each_variant
def test_a_log_prob_that_is_not_a_number_is_in_the_loss(variant):
    logp_BT = torch.tensor([[math.nan, -1.0]])
    policy = loss_of(variant, logp_BT, torch.full((1, 2), -1.0), torch.ones(1, 1), torch.ones(1, 2).bool())
    assert policy.loss_BT.isnan().any()


@each_variant
def test_on_policy_the_gradient_is_that_of_the_log_prob_times_the_advantage(variant):
    logp_BT, _, _, mask_BT = random_tokens(seed=2)
    logp_BT.requires_grad_()
    advantages_B1 = torch.tensor([[0.5], [-1.0], [2.0], [0.3], [-0.2]], dtype=torch.float64)
    policy = loss_of(variant, logp_BT, logp_BT.detach(), advantages_B1, mask_BT)
    policy.loss_BT.sum().backward()
    left_BT = mask_BT & (torch.arange(mask_BT.shape[1]) % 2 == 0) if variant == "m2po" else mask_BT
    torch.testing.assert_close(logp_BT.grad, torch.where(left_BT, -advantages_B1, 0.0))


@each_variant
def test_float32_agrees_with_float64(variant):
    tokens = random_tokens(seed=7)
    exact = loss_of(variant, *tokens).loss_BT
    rounded = loss_of(variant, *(values.float() for values in tokens[:3]), tokens[3]).loss_BT
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-4)
