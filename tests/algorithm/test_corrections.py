"""Correction weights and masks, the KL penalty and the measures of distance, against naive references."""

import math

import pytest
import torch

from asyncdapo.algorithm.corrections import chi2, correction_weights, effective_sample_size, kl_penalty
from asyncdapo.algorithm.policy_loss import policy_loss
from tests.algorithm.test_dapo import random_tokens

LEVELS = ["token", "sequence", "geometric"]


def tokens(seed=0):
    logp_BT, rollout_logp_BT, _, mask_BT = random_tokens(seed)
    return logp_BT, rollout_logp_BT, mask_BT


def naive_ratio(level, logp_T, rollout_logp_T, mask_T, token):
    log_ratios = [a - b for a, b, m in zip(logp_T, rollout_logp_T, mask_T, strict=True) if m]
    if level == "token":
        return math.exp(logp_T[token] - rollout_logp_T[token])
    return math.exp(sum(log_ratios) / (len(log_ratios) if level == "geometric" else 1))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_cut_at_the_upper_end_only(level, seed):
    logp_BT, rollout_logp_BT, mask_BT = tokens(seed)
    correction = correction_weights(logp_BT, rollout_logp_BT, mask_BT, level=level, mode="truncate", band=(0.0, 1.5))
    assert torch.equal(correction.mask_BT, mask_BT)
    for row, token in mask_BT.nonzero().tolist():
        lines = (values_BT[row].tolist() for values_BT in (logp_BT, rollout_logp_BT, mask_BT))
        ratio = naive_ratio(level, *lines, token)
        assert correction.weights_BT[row, token].item() == pytest.approx(min(ratio, 1.5))
        assert correction.truncated_BT[row, token].item() == (ratio > 1.5)
    assert not correction.truncated_BT[~mask_BT].any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_a_band_masks_what_lies_outside_and_leaves_the_rest_as_it_is(level, seed):
    logp_BT, rollout_logp_BT, mask_BT = tokens(seed)
    correction = correction_weights(logp_BT, rollout_logp_BT, mask_BT, level=level, mode="mask", band=(0.5, 2.0))
    for row, token in mask_BT.nonzero().tolist():
        lines = (values_BT[row].tolist() for values_BT in (logp_BT, rollout_logp_BT, mask_BT))
        ratio = naive_ratio(level, *lines, token)
        inside = 0.5 <= ratio <= 2.0
        assert correction.mask_BT[row, token].item() == inside
        assert correction.weights_BT[row, token].item() == pytest.approx(ratio if inside else 0.0)
    assert not correction.truncated_BT.any()


def test_the_ends_of_a_band_lie_inside():
    logp_BT = torch.tensor([[math.log(2.0), 0.0, math.log(0.5)]], dtype=torch.float64)
    zeros_BT, mask_BT = torch.zeros_like(logp_BT), torch.ones(1, 3, dtype=torch.bool)
    ends = tuple(logp_BT.exp()[0, [2, 0]].tolist())
    assert correction_weights(logp_BT, zeros_BT, mask_BT, level="token", mode="mask", band=ends).mask_BT.all()
    assert correction_weights(logp_BT, zeros_BT, mask_BT, level="none", outlier_band=ends).mask_BT.all()
    assert not correction_weights(logp_BT, zeros_BT, mask_BT, level="token", band=(0.0, ends[1])).truncated_BT.any()


@pytest.mark.parametrize(("scope", "left"), [("token", [[1, 0, 1], [1, 1, 0]]), ("sequence", [[0, 0, 0], [1, 1, 0]])])
@pytest.mark.parametrize("level", ["none", *LEVELS])
def test_an_outlier_masks_itself_or_its_whole_response_and_stays_in_the_weight_of_the_response(level, scope, left):
    log_ratio_BT = torch.tensor([[0.1, 9.0, -0.2], [0.3, -0.1, 99.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, True], [True, True, False]])
    zeros_BT = torch.zeros_like(log_ratio_BT)
    settings = {"level": level, "mode": "truncate", "band": (0.0, 1e9)}
    plain = correction_weights(log_ratio_BT, zeros_BT, mask_BT, **settings)
    correction = correction_weights(
        log_ratio_BT, zeros_BT, mask_BT, outlier_band=(1e-2, 1e2), outlier_scope=scope, **settings
    )
    assert correction.mask_BT.int().tolist() == left
    assert torch.equal(correction.weights_BT, plain.weights_BT * torch.tensor(left))


def test_without_a_level_the_weights_are_1_whatever_mode_and_band_say():
    logp_BT, rollout_logp_BT, mask_BT = tokens()
    for mode in ("truncate", "mask"):
        correction = correction_weights(logp_BT, rollout_logp_BT, mask_BT, level="none", mode=mode, band=(3.0, 4.0))
        assert torch.equal(correction.weights_BT, mask_BT.double())
        assert torch.equal(correction.mask_BT, mask_BT)
        assert not correction.truncated_BT.any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_garbage_outside_the_mask_changes_no_weight(level, mode):
    logp_BT, rollout_logp_BT, mask_BT = tokens()
    settings = {"level": level, "mode": mode, "band": (0.0, 2.0), "outlier_band": (0.1, 10.0)}
    clean = correction_weights(logp_BT, rollout_logp_BT, mask_BT, outlier_scope="sequence", **settings)
    dirty = correction_weights(
        torch.where(mask_BT, logp_BT, 1e308),
        torch.where(mask_BT, rollout_logp_BT, -1e308),
        mask_BT,
        outlier_scope="sequence",
        **settings,
    )
    assert all(torch.equal(one, other) for one, other in zip(vars(clean).values(), vars(dirty).values(), strict=True))
    assert not dirty.weights_BT[~mask_BT].any()


def test_no_gradient_passes_through_a_weight():
    logp_BT = torch.tensor([[-1.0, -0.5]], requires_grad=True)
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    start_BT = torch.tensor([[-1.2, -0.4]], requires_grad=True)
    weights_BT = correction_weights(start_BT, torch.tensor([[-1.5, -0.5]]), mask_BT, level="token").weights_BT
    policy = policy_loss("ppo", logp_BT, start_BT.detach(), torch.ones(1, 1), mask_BT, clip_low=0.9, clip_high=0.9)
    (weights_BT * policy.loss_BT).sum().backward()
    assert start_BT.grad is None
    torch.testing.assert_close(logp_BT.grad, -weights_BT * policy.ratio_BT.detach())


def test_an_untruncated_weight_turns_the_proximal_ratio_into_the_behaviour_ratio():
    logp_BT, rollout_logp_BT, mask_BT = tokens()
    start_BT = logp_BT + 0.01
    weights_BT = correction_weights(start_BT, rollout_logp_BT, mask_BT, level="token", band=(0.0, math.inf)).weights_BT
    settings = {"clip_low": 1.0, "clip_high": math.inf}
    advantages_B1 = torch.ones(len(logp_BT), 1, dtype=torch.float64)
    proximal = policy_loss("ppo", logp_BT, start_BT, advantages_B1, mask_BT, **settings)
    behaviour = policy_loss("ppo", logp_BT, rollout_logp_BT, advantages_B1, mask_BT, **settings)
    torch.testing.assert_close(weights_BT * proximal.loss_BT, behaviour.loss_BT)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_and_its_gradient_agree_with_a_naive_loop(estimator):
    logp_BT, ref_logp_BT, mask_BT = tokens(seed=2)
    logp_BT.requires_grad_()
    penalty_BT = kl_penalty(logp_BT, ref_logp_BT, mask_BT, estimator)
    penalty_BT.sum().backward()
    for row, token in mask_BT.nonzero().tolist():
        d = logp_BT[row, token].item() - ref_logp_BT[row, token].item()
        values = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}
        slopes = {"k1": 1.0, "k2": d, "k3": 1 - math.exp(-d)}
        assert penalty_BT[row, token].item() == pytest.approx(values[estimator])
        assert logp_BT.grad[row, token].item() == pytest.approx(slopes[estimator])
    assert not penalty_BT[~mask_BT].any()
    assert not logp_BT.grad[~mask_BT].any()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_garbage_outside_the_mask_gives_the_penalty_no_gradient(estimator):
    logp_BT = torch.tensor([[-1.0, -3e38, 3e38]], requires_grad=True)
    mask_BT = torch.tensor([[True, False, False]])
    kl_penalty(logp_BT, torch.tensor([[-2.0, 3e38, -3e38]]), mask_BT, estimator).sum().backward()
    assert torch.isfinite(logp_BT.grad).all()
    assert not logp_BT.grad[0, 1:].any()


def test_k3_of_policies_that_hardly_differ_keeps_its_digits_in_fp32():
    d = 1e-3
    penalty = kl_penalty(torch.tensor(d), torch.tensor(0.0), torch.tensor(True), "k3")
    assert penalty.item() == pytest.approx(math.exp(-d) - 1 + d, rel=1e-3)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    """Over all tokens of a small vocabulary, weighed by how likely the policy is to draw them."""
    logp_V = torch.tensor([0.7, -1.0, 0.3], dtype=torch.float64).log_softmax(-1)
    ref_logp_V = torch.tensor([-0.5, 0.6, 0.0], dtype=torch.float64).log_softmax(-1)
    kl = (logp_V.exp() * (logp_V - ref_logp_V)).sum().item()
    every_V = torch.ones(3, dtype=torch.bool)
    means = {
        name: (logp_V.exp() * kl_penalty(logp_V, ref_logp_V, every_V, name)).sum().item() for name in ("k1", "k2", "k3")
    }
    assert means["k1"] == pytest.approx(kl)
    assert means["k3"] == pytest.approx(kl)
    assert means["k2"] != pytest.approx(kl, rel=0.01)


def test_the_effective_sample_size_is_1_for_equal_weights_and_one_nth_for_a_single_one():
    assert effective_sample_size(sum_w=4 * 0.7, sum_w2=4 * 0.49, num=4) == pytest.approx(1.0)
    assert effective_sample_size(sum_w=9.0, sum_w2=81.0, num=4) == pytest.approx(0.25)
    assert effective_sample_size(0.0, 0.0, 0) == 0.0
    assert effective_sample_size(0.0, 0.0, 5) == 0.0


def test_chi2_is_0_on_policy_and_grows_with_the_spread_of_the_ratios():
    assert chi2(sum_w2=5.0, num=5) == 0.0
    assert chi2(sum_w2=0.25 + 2.25, num=2) == pytest.approx(0.25)
    assert chi2(0.0, 0) == 0.0


@pytest.mark.parametrize(
    "masks",
    [
        {"level": "none", "outlier_band": (0.5, 2.0)},
        {"level": "none", "outlier_band": (0.5, 2.0), "outlier_scope": "sequence"},
        {"level": "token", "mode": "mask", "band": (0.5, 2.0)},
    ],
)
def test_a_nan_ratio_isnt_an_outlier_and_stays_visible(masks):
    logp_BT = torch.tensor([[math.nan, -1.0, -1.0]])
    corrected = correction_weights(logp_BT, torch.full((1, 3), -1.0), torch.ones(1, 3, dtype=torch.bool), **masks)
    assert corrected.mask_BT.all()
