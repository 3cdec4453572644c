"""Completions of advantage 0 are not computed, and the gradient is what it would be if they were."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import torch

from asyncdapo.algorithm.advantages import batch_advantages
from asyncdapo.learner.batches.samples import rows_by_update
from asyncdapo.learner.config import LossConfig
from asyncdapo.shares import Batch
from asyncdapo.transport.payload import Payload
from tests.learner.tiny import (
    clipped_gradients,
    dealt_to,
    make_batch,
    make_exact_learner,
    make_learner,
    payloads_of,
    save_tiny_llama,
    train,
    with_equal_rewards,
)

CONSTANT = {1, 2, 5}
LOSSES = {
    **{agg: LossConfig(agg=agg) for agg in ("token-mean", "seq-mean-token-mean", "prompt-mean")},
    "proximal": LossConfig(anchor="proximal"),
    "gspo": LossConfig(variant="gspo", clip_low=0.1, clip_high=0.2),
    "cispo": LossConfig(variant="cispo", advantage="rloo"),
}
USES_ZERO_ADVANTAGE = {
    "kl": LossConfig(kl_coef=0.1),
    "entropy": LossConfig(entropy_coef=0.01),
    "masks": LossConfig(outlier_band=(0.5, 2.0)),
    "m2po": LossConfig(variant="m2po"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def a_batch(constant: set[int]) -> tuple[Batch, Payload]:
    batch, payload = make_batch(num_groups=6, seed=13)
    groups = [with_equal_rewards(group) if place in constant else group for place, group in enumerate(batch.groups)]
    return msgspec.structs.replace(batch, groups=groups), payload


def gradients_of(path: str, loss: LossConfig, *, all_rows: bool) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Of each update of a step, in float64. `all_rows`: those without an advantage are computed, too."""
    learner = make_exact_learner(path, loss=loss, updates_per_step=2, epochs=2, tokens_per_microbatch=60)
    gradients = clipped_gradients(learner)
    batch, payload = a_batch(CONSTANT)
    batch = dealt_to(learner, batch)
    payloads = payloads_of(batch, payload)
    prepared = learner.prepare(batch, payloads)
    if all_rows:
        prepared = replace(prepared, rows=rows_by_update(batch, payloads, 0, batch_advantages(loss.advantage)))
    return gradients, learner.train(prepared)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_has_no_advantage_is_left_out_and_the_gradient_stays(path, loss) -> None:
    gradients, metrics = gradients_of(path, LOSSES[loss], all_rows=False)
    expected, computed = gradients_of(path, LOSSES[loss], all_rows=True)
    assert len(gradients) == len(expected) == 4
    for gradient, reference in zip(gradients, expected, strict=True):
        assert reference.norm() > 0
        assert (gradient - reference).norm() <= 1e-12 * reference.norm()
    batch, _ = a_batch(CONSTANT)
    tokens = [group.num_tokens for group in batch.groups]
    share = sum(tokens[place] for place in CONSTANT) / sum(tokens)
    assert metrics["learner/tokens"] == computed["learner/tokens"] == 2 * sum(tokens)
    assert metrics["learner/loss"] == pytest.approx(computed["learner/loss"], rel=1e-12)
    assert metrics["learner/uncomputed_ratio"] == pytest.approx(share)
    assert computed["learner/uncomputed_ratio"] == 0
    assert metrics["learner/forward_tokens"] < (1 - share / 2) * computed["learner/forward_tokens"]


@pytest.mark.parametrize("loss", USES_ZERO_ADVANTAGE)
def test_a_loss_that_needs_them_computes_all(path, loss) -> None:
    gradients, metrics = gradients_of(path, USES_ZERO_ADVANTAGE[loss], all_rows=False)
    expected, computed = gradients_of(path, USES_ZERO_ADVANTAGE[loss], all_rows=True)
    assert all(torch.equal(gradient, reference) for gradient, reference in zip(gradients, expected, strict=True))
    assert metrics["learner/forward_tokens"] == computed["learner/forward_tokens"]
    assert "learner/uncomputed_ratio" not in metrics


def test_a_step_of_constant_groups_is_an_update_with_a_gradient_of_zero(path) -> None:
    learner = make_learner(path)
    batch, payload = a_batch(set(range(6)))
    metrics = train(learner, batch, payload)
    assert metrics["learner/grad_norm"] == metrics["learner/loss"] == metrics["learner/forward_tokens"] == 0
    assert metrics["learner/uncomputed_ratio"] == 1
    assert metrics["learner/lr"] > 0
    assert metrics["learner/bad_updates"] == 0
