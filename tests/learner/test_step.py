"""The gradient of an update: the same for every cut into micro-batches, and that of a naive loop over completions."""

import math

import pytest
import torch

from asyncdapo.learner.config import LossConfig
from asyncdapo.learner.packing import group_rows, micro_batches
from asyncdapo.learner.step import accumulate_gradient
from tests.learner.tiny import make_batch, tiny_llama


def update_rows(seed=0):
    return [row for rows in group_rows(*make_batch(seed=seed, num_groups=5)) for row in rows]


def gradient_of(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("tokens_per_microbatch", [1, 20, 33, 64, 150])
def test_every_micro_batch_size_gives_the_same_gradient(tokens_per_microbatch):
    def gradient_and_sums(max_tokens):
        model = tiny_llama().double()
        packed = micro_batches(update_rows(), max_tokens)
        sums = accumulate_gradient(model, packed, LossConfig(), 1.0)
        return gradient_of(model), sums, len(packed)

    whole, whole_sums, num_whole = gradient_and_sums(10_000)
    parts, parts_sums, num_parts = gradient_and_sums(tokens_per_microbatch)
    assert num_whole == 1
    assert num_parts > 1
    assert (parts - whole).norm() <= 1e-6 * whole.norm()
    assert whole.norm() > 0
    for name in ("loss", "entropy", "ratio", "k3", "clipped_low", "clipped_high", "clipped_dual", "num_tokens"):
        assert getattr(parts_sums, name) == pytest.approx(getattr(whole_sums, name), rel=1e-9)


@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_the_gradient_is_that_of_a_naive_loop_over_completions(dual_clip):
    rows, loss, temperature = update_rows(seed=1), LossConfig(dual_clip=dual_clip), 0.8
    model = tiny_llama().double()
    sums = accumulate_gradient(model, micro_batches(rows, 64), loss, temperature)
    got = gradient_of(model)

    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        tokens_T = torch.tensor([*row.prompt_ids, *row.token_ids], dtype=torch.int64)
        logits_TV = model(tokens_T[None]).logits[0, len(row.prompt_ids) - 1 : -1] / temperature
        logp_T = logits_TV.log_softmax(-1).gather(-1, tokens_T[len(row.prompt_ids) :, None])[:, 0]
        for logp, rollout_logprob in zip(logp_T, row.rollout_logprobs.tolist(), strict=True):
            ratio = (logp - rollout_logprob).exp()
            objective = torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.28) * row.advantage)
            if dual_clip and row.advantage < 0:
                objective = objective.clamp(min=row.advantage * dual_clip)
            total = total - objective
    num_tokens = sum(len(row.token_ids) for row in rows)
    (total / num_tokens).backward()
    assert sums.num_tokens == num_tokens
    assert sums.loss == pytest.approx(total.item(), rel=1e-6)
    assert (got - gradient_of(model)).norm() <= 1e-6 * got.norm()


def test_masked_tokens_neither_train_nor_count():
    rows = update_rows(seed=2)
    rows[0].loss_mask[1:] = False
    model = tiny_llama().double()
    sums = accumulate_gradient(model, micro_batches(rows, 64), LossConfig(), 1.0)
    gradient = gradient_of(model)
    assert sums.num_tokens == sum(row.num_loss_tokens for row in rows)

    rows[0].rollout_logprobs[1:] = -5.0
    model.zero_grad()
    assert accumulate_gradient(model, micro_batches(rows, 64), LossConfig(), 1.0) == sums
    assert torch.equal(gradient_of(model), gradient)


def test_sums_describe_ratio_divergence_and_clipping():
    rows = update_rows(seed=4)
    model = tiny_llama().double()
    for row, shift in zip(rows, [0.5, -0.5] * len(rows), strict=False):
        tokens_T = torch.tensor([*row.prompt_ids, *row.token_ids], dtype=torch.int64)
        with torch.no_grad():
            logp_TV = model(tokens_T[None]).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        row.rollout_logprobs[:] = logp_TV.gather(-1, tokens_T[len(row.prompt_ids) :, None])[:, 0].numpy() - shift
    above = [row for row, shift in zip(rows, [0.5, -0.5] * len(rows), strict=False) if shift > 0]
    num_above = sum(row.num_loss_tokens for row in above)
    sums = accumulate_gradient(model, micro_batches(rows, 64), LossConfig(dual_clip=1.1), 1.0)
    num_below = sums.num_tokens - num_above
    assert sums.ratio == pytest.approx(num_above * math.exp(0.5) + num_below * math.exp(-0.5), rel=1e-5)
    k3 = num_above * (math.exp(0.5) - 1.5) + num_below * (math.exp(-0.5) - 0.5)
    assert sums.k3 == pytest.approx(k3, rel=1e-5)
    assert sums.clipped_high == sum(row.num_loss_tokens for row in above if row.advantage > 0)
    assert sums.clipped_dual == sum(row.num_loss_tokens for row in above if row.advantage < 0)
    assert sums.clipped_low == sum(row.num_loss_tokens for row in rows[1::2] if row.advantage < 0)
