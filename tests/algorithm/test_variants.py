"""Ratios, advantages and averages of others against naive references in plain floats."""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.algorithm.dapo import clipped_loss, importance_ratio
from asyncdapo.algorithm.variants import (
    ADVANTAGES,
    AGGREGATIONS,
    aggregation_weights,
    policy_loss,
    response_ratio,
)
from tests.algorithm.test_dapo import naive_token_loss, random_tokens

CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
VARIANTS = ["ppo", "gspo", "cispo"]
MAX_LENGTH = 8


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_garbage_outside_the_mask_reaches_nothing(variant):
    logp_BT, old_logp_BT, advantages_BT, mask_BT = (values.float() for values in random_tokens(seed=5))
    mask_BT = mask_BT.bool()
    garbage_BT = torch.where(torch.arange(mask_BT.shape[1]) % 2 == 0, 3e38, -3e38).expand(mask_BT.shape)

    def differentiated(logp_BT, old_logp_BT, advantages_BT):
        logp_BT = logp_BT.clone().requires_grad_()
        policy = policy_loss(variant, logp_BT, old_logp_BT, advantages_BT, mask_BT, dual_clip=3.0, **CLIPS)
        policy.loss_BT.sum().backward()
        return [*vars(policy).values(), logp_BT.grad]

    clean = differentiated(*(torch.where(mask_BT, v, 0.0) for v in (logp_BT, old_logp_BT, advantages_BT)))
    dirty = differentiated(
        torch.where(mask_BT, logp_BT, garbage_BT),
        torch.where(mask_BT, old_logp_BT, -garbage_BT),
        torch.where(mask_BT, advantages_BT, garbage_BT),
    )
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))
    assert all(torch.isfinite(values).all() and not values[~mask_BT].any() for values in dirty)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_response_without_a_token_has_no_loss_and_no_gradient(variant):
    logp_BT = torch.full((1, 3), -1.0, requires_grad=True)
    mask_BT = torch.zeros(1, 3, dtype=torch.bool)
    policy = policy_loss(variant, logp_BT, torch.zeros(1, 3), torch.ones(1, 1), mask_BT, **CLIPS)
    policy.loss_BT.sum().backward()
    assert not policy.loss_BT.any()
    assert not logp_BT.grad.any()


def test_the_ratio_of_a_response_is_the_product_of_its_tokens_ratios():
    logp_BT = torch.tensor([[-1.0, -2.0, 50.0]], dtype=torch.float64)
    old_logp_BT = torch.tensor([[-1.5, -1.0, -50.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, False]])
    product = response_ratio(logp_BT, old_logp_BT, mask_BT, geometric=False)
    geometric = response_ratio(logp_BT, old_logp_BT, mask_BT, geometric=True)
    assert (product.item(), geometric.item()) == pytest.approx((math.exp(-0.5), math.exp(-0.25)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_ratio_beyond_the_clamp_is_finite(variant):
    logp_BT = torch.tensor([[-1.0, -1000.0]])
    policy = policy_loss(variant, logp_BT, logp_BT.flip(-1) * 3, torch.ones(1, 1), torch.ones(1, 2).bool(), **CLIPS)
    assert torch.isfinite(policy.ratio_BT).all()
    assert policy.ratio_BT.max() <= math.exp(20) * 1.001


def test_the_advantages_differ_by_what_they_divide_by_and_compare_with():
    rewards_G = torch.tensor([3.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert ADVANTAGES["dr_grpo"](rewards_G).tolist() == [2.0, -1.0, 0.0, -1.0]
    assert ADVANTAGES["rloo"](rewards_G).tolist() == pytest.approx([3 - 1 / 3, -4 / 3, 0, -4 / 3])
    assert ADVANTAGES["grpo"](rewards_G).tolist() == pytest.approx([v / 2**0.5 for v in (2, -1, 0, -1)], rel=1e-5)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [-1.0], [1e8, 1e8]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_that_is_constant_or_alone_has_advantage_exactly_zero(advantage, rewards, dtype):
    assert ADVANTAGES[advantage](torch.tensor(rewards, dtype=dtype)).tolist() == [0.0] * len(rewards)


def naive_average(agg, losses, groups, max_length):
    """`losses`: the token losses of each completion, lists of floats; `groups`: the prompt of each."""
    with_tokens = [tokens for tokens in losses if tokens]
    if not with_tokens:
        return 0.0
    flat = [loss for tokens in losses for loss in tokens]
    if agg == "token-mean":
        return sum(flat) / len(flat)
    if agg == "token-sum":
        return sum(flat)
    if agg == "prompt-mean":
        by_prompt = defaultdict(list)
        for group, tokens in zip(groups, losses, strict=True):
            by_prompt[group] += tokens
        means = [sum(tokens) / len(tokens) for tokens in by_prompt.values() if tokens]
        return sum(means) / len(means)
    divisor = {
        "seq-mean-token-sum": lambda tokens: 1,
        "seq-mean-token-mean": len,
        "seq-mean-token-sum-norm": lambda tokens: max_length,
    }[agg]
    return sum(sum(tokens) / divisor(tokens) for tokens in with_tokens) / len(with_tokens)


def weigh(agg, losses, groups, copies):
    """The loss as the learner forms it: a weight for each completion."""
    weights_N = aggregation_weights(
        agg,
        torch.tensor([len(tokens) for tokens in losses], dtype=torch.int64),
        torch.tensor(groups, dtype=torch.int64),
        torch.tensor(copies, dtype=torch.int64),
        max_response_length=MAX_LENGTH,
    )
    assert weights_N.dtype == torch.float64
    return sum(weight * sum(tokens) for weight, tokens in zip(weights_N.tolist(), losses, strict=True))


completions = st.lists(st.lists(st.floats(-5, 5), max_size=MAX_LENGTH), max_size=4)
updates = st.lists(st.tuples(completions, st.integers(1, 3)), max_size=4)
"""Groups of an update: the token losses of each completion, and how often the group stands in the update."""


@pytest.mark.parametrize("agg", AGGREGATIONS)
@given(groups=updates)
def test_an_average_is_that_of_the_update_in_which_copies_stand_one_by_one(agg, groups):
    losses = [tokens for group, _ in groups for tokens in group]
    ids = [index for index, (group, _) in enumerate(groups) for _ in group]
    copies = [count for group, count in groups for _ in group]
    written_out = [
        ((index, copy), tokens) for index, (group, n) in enumerate(groups) for copy in range(n) for tokens in group
    ]
    naive = naive_average(agg, [tokens for _, tokens in written_out], [group for group, _ in written_out], MAX_LENGTH)
    assert weigh(agg, losses, ids, copies) == pytest.approx(naive, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_a_completion_without_a_token_changes_no_average(agg):
    losses, groups = [[1.0, 2.0], [4.0], [-1.0] * 8], [0, 0, 1]
    with_empty = weigh(agg, [*losses, [], []], [*groups, 1, 2], [1] * 5)
    assert with_empty == pytest.approx(weigh(agg, losses, groups, [1] * 3))


@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_an_update_without_any_token_has_finite_weights(agg):
    no_tokens_N = torch.zeros(3, dtype=torch.int64)
    weights_N = aggregation_weights(agg, no_tokens_N, no_tokens_N, no_tokens_N + 1, max_response_length=MAX_LENGTH)
    assert torch.isfinite(weights_N).all()


def test_a_group_of_which_only_a_part_is_copied_has_no_mean_over_prompts():
    ones_N = torch.ones(2, dtype=torch.int64)
    copies_N = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="equally often"):
        aggregation_weights("prompt-mean", ones_N, ones_N, copies_N, max_response_length=MAX_LENGTH)
