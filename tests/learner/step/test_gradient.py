"""The gradient of an update's rows: that of a naive loop over completions, whatever the cut into micro-batches."""

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from asyncdapo.algorithm.advantages import batch_advantages
from asyncdapo.algorithm.policy_loss import policy_loss
from asyncdapo.learner.batches.samples import rows_by_update
from asyncdapo.learner.config import LossConfig
from asyncdapo.learner.model.packing import Work
from asyncdapo.learner.model.sharding import gather
from asyncdapo.learner.step.gradient import accumulate_gradient
from asyncdapo.learner.step.ranks import ALONE
from tests.learner.tiny import make_batch, payloads_of, sharded, tiny_llama


def update_rows(seed=0):
    """Rows of five groups, each token weighted as in a token mean."""
    batch, payload = make_batch(seed=seed, num_groups=5)
    rows = rows_by_update(batch, payloads_of(batch, payload), 0, batch_advantages("grpo"))[0]
    num_tokens = sum(row.num_loss_tokens for row in rows)
    return [replace(row, weight=1 / num_tokens) for row in rows]


def accumulate(model, rows, loss=None, temperature=1.0, max_tokens=64):
    """The learner's gradient, left in a model of which it has a sharded copy."""
    policy = sharded(deepcopy(model), temperature)
    part = accumulate_gradient(policy, rows, loss or LossConfig(), max_tokens=max_tokens, ranks=ALONE)
    for parameter, of_policy in zip(model.parameters(), policy.parameters(), strict=True):
        parameter.grad = gather(of_policy.grad)
    return part


def gradient_of(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def own_logprobs(model, row, temperature=1.0):
    tokens_T = torch.tensor([*row.prompt_ids, *row.token_ids], dtype=torch.int64)
    logits_TV = model(tokens_T[None]).logits[0, len(row.prompt_ids) - 1 : -1] / temperature
    logp_TV = logits_TV.log_softmax(-1)
    return logp_TV.gather(-1, tokens_T[len(row.prompt_ids) :, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


@pytest.mark.parametrize("max_tokens", [1, 20, 33, 64, 150])
def test_every_micro_batch_size_gives_the_same_gradient_and_sums(max_tokens):
    def gradient_and_part(max_tokens):
        model = tiny_llama().double()
        part = accumulate(model, update_rows(), max_tokens=max_tokens)
        return gradient_of(model), part

    whole, whole_part = gradient_and_part(10_000)
    parts, parts_part = gradient_and_part(max_tokens)
    assert parts_part.work.num_computed_tokens >= whole_part.work.num_computed_tokens
    assert (parts - whole).norm() <= 1e-6 * whole.norm()
    assert whole.norm() > 0
    assert parts_part.loss == pytest.approx(whole_part.loss, rel=1e-9)
    assert parts_part.sums.metrics() == pytest.approx(whole_part.sums.metrics(), rel=1e-9)


@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_the_gradient_is_that_of_a_naive_loop_over_completions(dual_clip):
    rows, loss, temperature = update_rows(seed=1), LossConfig(dual_clip=dual_clip), 0.8
    model = tiny_llama().double()
    part = accumulate(model, rows, loss, temperature)
    got = gradient_of(model)

    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logp_T, _ = own_logprobs(model, row, temperature)
        for logp, rollout_logprob in zip(logp_T, row.rollout_logprobs.tolist(), strict=True):
            ratio = (logp - rollout_logprob).exp()
            objective = torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.28) * row.advantage)
            if dual_clip and row.advantage < 0:
                objective = objective.clamp(min=row.advantage * dual_clip)
            total = total - objective
    num_tokens = sum(len(row.token_ids) for row in rows)
    (total / num_tokens).backward()
    assert part.sums.num_tokens == num_tokens
    assert part.loss == pytest.approx(total.item() / num_tokens, rel=1e-6)
    assert (got - gradient_of(model)).norm() <= 1e-6 * got.norm()


def test_kl_penalty_and_entropy_bonus_are_those_of_a_naive_loop():
    model, reference = tiny_llama().double(), tiny_llama(seed=1).double()
    rows = []
    for row in update_rows(seed=2):
        with torch.no_grad():
            rows.append(replace(row, reference_logprobs=own_logprobs(reference, row)[0].numpy(), advantage=0.0))
    accumulate(model, rows, LossConfig(kl_coef=0.3, entropy_coef=0.2))
    got = gradient_of(model)

    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logp_T, entropy_T = own_logprobs(model, row)
        distance_T = logp_T - torch.from_numpy(row.reference_logprobs)
        k3_T = (-distance_T).exp() - 1 + distance_T
        total = total + row.weight * (0.3 * k3_T - 0.2 * entropy_T).sum()
    total.backward()
    assert (got - gradient_of(model)).norm() <= 1e-6 * got.norm()
    assert got.norm() > 0


def test_under_the_proximal_anchor_the_distance_to_the_rollout_policy_is_a_constant_weight():
    """In a single update the ratio is 1 everywhere: the gradient is that of −weight · advantage · logp."""
    rows, model = update_rows(seed=3), tiny_llama().double()
    accumulate(model, rows, LossConfig(anchor="proximal", correction_band=(0.0, 1.5)))
    got = gradient_of(model)

    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logp_T, _ = own_logprobs(model, row)
        weights_T = (logp_T.detach() - torch.from_numpy(row.rollout_logprobs)).exp().clamp(max=1.5)
        total = total - row.weight * row.advantage * (weights_T * logp_T).sum()
    total.backward()
    assert (got - gradient_of(model)).norm() <= 1e-6 * got.norm()


def test_the_loglinear_anchor_lies_between_what_sampled_and_the_policy():
    rows = [
        replace(row, token_staleness=np.arange(len(row.token_ids), dtype=np.int32) % 4) for row in update_rows(seed=4)
    ]
    model = tiny_llama().double()
    part = accumulate(model, rows, LossConfig(anchor="loglinear", dual_clip=None))
    got = gradient_of(model)

    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logp_T, _ = own_logprobs(model, row)
        for logp, rollout_logprob, staleness in zip(
            logp_T, row.rollout_logprobs.tolist(), row.token_staleness.tolist(), strict=True
        ):
            share = 1 / max(1, staleness)
            anchor = share * rollout_logprob + (1 - share) * logp.detach()
            ratio, weight = (logp - anchor).exp(), (anchor - rollout_logprob).exp().clamp(max=2.0)
            objective = torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.28) * row.advantage)
            total = total - row.weight * weight * objective
    total.backward()
    assert (got - gradient_of(model)).norm() <= 1e-6 * got.norm()
    assert part.loss == pytest.approx(total.item(), rel=1e-6)


def test_a_trust_region_in_units_of_the_entropy_takes_that_of_the_policy():
    rows, model = update_rows(seed=5), tiny_llama().double()
    part = accumulate(model, rows, LossConfig(variant="estr", estr_threshold=0.1, dual_clip=None))
    got = gradient_of(model)

    model.zero_grad()
    total, untrusted = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        logp_T, entropy_T = own_logprobs(model, row)
        for logp, rollout_logprob, entropy in zip(
            logp_T, row.rollout_logprobs.tolist(), entropy_T.tolist(), strict=True
        ):
            if (logp.item() - rollout_logprob) ** 2 > 0.1 * (entropy + 0.01):
                untrusted += 1
                continue
            ratio = (logp - rollout_logprob).exp()
            objective = torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.28) * row.advantage)
            total = total - row.weight * objective
    total.backward()
    assert 0 < untrusted < part.sums.num_tokens
    assert part.sums.metrics()["learner/untrusted_ratio"] == pytest.approx(untrusted / part.sums.num_tokens)
    assert (got - gradient_of(model)).norm() <= 1e-6 * got.norm()


def test_masked_tokens_neither_train_nor_count():
    rows = update_rows(seed=2)
    rows[0].loss_mask[1:] = False
    model = tiny_llama().double()
    part = accumulate(model, rows)
    gradient = gradient_of(model)
    assert part.sums.num_tokens == sum(row.num_loss_tokens for row in rows)

    rows[0].rollout_logprobs[1:] = -5.0
    model.zero_grad()
    again = accumulate(model, rows)
    assert again.sums.metrics() == part.sums.metrics()
    assert again.loss == part.loss
    assert torch.equal(gradient_of(model), gradient)


def test_without_a_loss_bearing_token_nothing_is_computed_that_counts():
    rows = update_rows()
    for row in rows:
        row.loss_mask[:] = False
    part = accumulate(tiny_llama(), rows)
    assert (part.loss, part.sums.num_tokens, part.work) == (0.0, 0, Work())


def test_sums_describe_ratio_divergence_and_clipping():
    rows, model = update_rows(seed=4), tiny_llama().double()
    shifted = list(zip(rows, [0.5, -0.5] * len(rows), strict=False))
    for row, shift in shifted:
        with torch.no_grad():
            row.rollout_logprobs[:] = own_logprobs(model, row)[0].numpy() - shift
    above = [row for row, shift in shifted if shift > 0]
    num_tokens, num_above = (sum(row.num_loss_tokens for row in some) for some in (rows, above))
    num_below = num_tokens - num_above
    metrics = accumulate(model, rows, LossConfig(dual_clip=1.1)).sums.metrics()
    ratio = num_above * math.exp(0.5) + num_below * math.exp(-0.5)
    squared = num_above * math.e + num_below / math.e
    k3 = num_above * (math.exp(0.5) - 1.5) + num_below * (math.exp(-0.5) - 0.5)
    assert metrics["learner/tokens"] == num_tokens
    assert metrics["learner/ratio_mean"] == pytest.approx(ratio / num_tokens, rel=1e-5)
    assert metrics["learner/ess"] == pytest.approx(ratio**2 / (num_tokens * squared), rel=1e-5)
    assert metrics["learner/chi2"] == pytest.approx(squared / num_tokens - 1, rel=1e-5)
    assert metrics["learner/k3"] == pytest.approx(k3 / num_tokens, rel=1e-5)
    assert metrics["learner/second_moment"] == pytest.approx(0.25, rel=1e-5)
    assert metrics["learner/ratio_p01"] == pytest.approx(math.exp(-0.5), rel=0.01)
    assert metrics["learner/ratio_p99"] == pytest.approx(math.exp(0.5), rel=0.01)

    def share(rows_clipped):
        return sum(row.num_loss_tokens for row in rows_clipped) / num_tokens

    assert metrics["learner/clip_high_ratio"] == pytest.approx(share(row for row in above if row.advantage > 0))
    assert metrics["learner/clip_dual_ratio"] == pytest.approx(share(row for row in above if row.advantage < 0))
    assert metrics["learner/clip_low_ratio"] == pytest.approx(share(row for row in rows[1::2] if row.advantage < 0))


def test_every_staleness_bucket_has_its_own_numbers():
    rows = [replace(row, staleness=number % 7) for number, row in enumerate(update_rows(seed=5))]
    metrics = accumulate(tiny_llama().double(), rows).sums.metrics()

    def tokens(*stalenesses):
        return sum(row.num_loss_tokens for row in rows if row.staleness in stalenesses)

    buckets = {"0": (0,), "1": (1,), "2": (2,), "3_4": (3, 4), "5_8": (5, 6)}
    for bucket, stalenesses in buckets.items():
        assert metrics[f"learner/staleness_{bucket}/tokens"] == tokens(*stalenesses)
        assert 0 < metrics[f"learner/staleness_{bucket}/ess"] <= 1
    assert "learner/staleness_9_up/tokens" not in metrics
    some = accumulate(tiny_llama().double(), [row for row in rows if row.staleness == 1]).sums.metrics()
    for name in ("ess", "k3", "chi2", "chi2_sequence", "ratio_p99", "clip_low_ratio", "clip_high_ratio"):
        assert metrics[f"learner/staleness_1/{name}"] == pytest.approx(some[f"learner/{name}"])


def gradient_shares(loss: LossConfig, log_ratio: float) -> torch.Tensor:
    """Of each of 100,001 tokens with a negative advantage, of which the first has this log ratio, the others 0."""
    logp_BT = torch.full((1, 100_001), -1.0, dtype=torch.float64, requires_grad=True)
    old_logp_BT = torch.full_like(logp_BT, -1.0)
    old_logp_BT[0, 0] -= log_ratio
    bounds = {"clip_low": loss.clip_low, "clip_high": loss.clip_high, "dual_clip": loss.dual_clip}
    mask_BT = torch.ones_like(logp_BT, dtype=torch.bool)
    policy_loss(loss.variant, logp_BT, old_logp_BT, torch.tensor([[-1.0]]), mask_BT, **bounds).loss_BT.sum().backward()
    return (logp_BT.grad.abs() / logp_BT.grad.abs().sum())[0]


def test_one_token_that_the_policy_has_come_to_love_does_not_outweigh_a_hundred_thousand() -> None:
    assert gradient_shares(LossConfig(dual_clip=None), log_ratio=12)[0] == pytest.approx(0.62, abs=0.005)
    assert gradient_shares(LossConfig(), log_ratio=12)[0] == 0
    largest = gradient_shares(LossConfig(), log_ratio=math.log(9.99))[0]
    assert 9e-5 < largest < 1e-4
