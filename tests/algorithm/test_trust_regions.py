"""What stands in the place of the clip: which tokens it masks, and what it leaves of the others' gradient.

The formulas are held by the vectors (`tests/vectors/off_policy_vectors.json`); here is what they are for.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.algorithm.corrections import second_moment_limit
from asyncdapo.algorithm.policy_loss import policy_loss
from tests.vectors.reference import m2po_left

exact = st.integers(0, 128).map(lambda number: number / 64)
"""Sums and means of them are compared without rounding."""


def of_probabilities(new, old, advantage, variant, **numbers):
    """The loss of one token that goes from one probability to another."""
    logp_BT, old_logp_BT = (torch.tensor([[value]], dtype=torch.float64).log() for value in (new, old))
    logp_BT.requires_grad_()
    mask_BT = torch.ones(1, 1, dtype=torch.bool)
    policy = policy_loss(variant, logp_BT, old_logp_BT, torch.full((1, 1), advantage), mask_BT, **numbers)
    policy.loss_BT.sum().backward()
    return policy, logp_BT.grad.item()


@given(squares=st.lists(exact, max_size=12), threshold=exact)
def test_the_fewest_tokens_are_masked_that_bring_the_second_moment_below_the_threshold(squares, threshold):
    squares_n = torch.tensor(squares, dtype=torch.float64)
    limit = second_moment_limit(squares_n, torch.ones(len(squares)), threshold)
    assert (squares_n < limit).tolist() == m2po_left(squares, threshold)


def test_a_token_of_a_copied_group_counts_as_often_in_the_second_moment():
    squares_n, counts_n = torch.tensor([0.3, 0.0, 0.1], dtype=torch.float64), torch.tensor([1, 4, 2])
    assert second_moment_limit(squares_n, counts_n, 0.04) == 0.3  # (0 · 4 + 0.1 · 2) / 6
    assert second_moment_limit(squares_n, counts_n, 0.08) == math.inf
    assert second_moment_limit(squares_n, torch.ones(3), 0.04) == 0.1


@pytest.mark.parametrize("variant", ["dppo_tv", "dppo_kl"])
@pytest.mark.parametrize(("new", "old", "advantage", "is_masked"), [
    (0.5, 0.2, 1.0, True),
    (0.2, 0.5, -1.0, True),
    (0.5, 0.2, -1.0, False),
    (0.2, 0.5, 1.0, False),
    (0.51, 0.5, 1.0, False),
    (1e-3, 1e-5, 1.0, False),
    (1.0, 0.5, 1.0, True),
])  # fmt: skip
def test_a_token_is_masked_when_it_leaves_the_divergence_further(variant, new, old, advantage, is_masked):
    """A rare token may have any ratio, which PPO would clip; back towards the other policy is never masked."""
    numbers = {"clip_low": 0.1, "clip_high": 0.1} if variant == "dppo_tv" else {"clip_low": 0.05, "clip_high": 0.05}
    policy, gradient = of_probabilities(new, old, advantage, variant, **numbers)
    assert (policy.clipped_low_BT | policy.clipped_high_BT).item() == is_masked
    assert gradient == (0.0 if is_masked else pytest.approx(-advantage * min(new / old, 20.0)))


def test_a_truncated_ratio_keeps_a_bounded_gradient():
    policy, gradient = of_probabilities(1e-3, 1e-6, 1.0, "dppo_tv", clip_low=0.1, clip_high=0.1, dppo_ratio_cap=5.0)
    assert policy.clipped_dual_BT.item()
    assert (policy.loss_BT.item(), gradient) == (-5.0, -5.0)


def test_a_token_may_move_the_further_the_less_certain_the_model_is():
    def untrusted(entropy):
        entropy_BT = torch.full((1, 1), entropy)
        policy, _ = of_probabilities(0.6, 0.5, 1.0, "estr", estr_threshold=0.1, entropy_BT=entropy_BT)
        return policy.untrusted_BT.item()

    assert [untrusted(entropy) for entropy in (0.0, 0.2, 0.5, 2.0)] == [True, True, False, False]


def test_a_soft_gate_fades_out_on_both_sides_and_sooner_for_negative_advantages():
    def gate(new, old, advantage):
        policy, gradient = of_probabilities(new, old, advantage, "sapo")
        assert gradient == pytest.approx(-advantage * new / old * policy.gate_BT.item())
        return policy.gate_BT.item()

    assert gate(0.3, 0.3, 1.0) == gate(0.3, 0.3, -1.0) == 1.0
    assert 1 > gate(0.6, 0.3, 1.0) > gate(0.6, 0.3, -1.0) > gate(0.9, 0.3, -1.0) > 0
    assert gate(0.1, 0.3, 1.0) < 1


def test_a_response_that_has_become_unlikely_or_too_likely_is_let_go():
    def gate(log_ratio, advantage):
        logp_BT, mask_BT = torch.full((1, 4), log_ratio / 4), torch.ones(1, 4, dtype=torch.bool)
        policy = policy_loss("vespo", logp_BT, torch.zeros(1, 4), torch.full((1, 1), advantage), mask_BT)
        assert policy.gate_BT.unique().numel() == 1, "the gate is of the response"
        return policy.gate_BT[0, 0].item()

    for advantage in (1.0, -1.0):
        assert gate(0.0, advantage) == 1.0
        assert gate(-20.0, advantage) < 1e-15
        assert gate(3.0, advantage) < 1e-10
    assert gate(-0.5, -1.0) < gate(-0.5, 1.0)
