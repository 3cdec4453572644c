"""The gradient of one optimizer update, and what is measured on the way.

In come the micro-batches of one update, out goes d loss / d θ added to `.grad`. Invariant: every micro-batch is divided
by the same number, the loss-bearing tokens of the whole update, known before the first backward pass; so the gradient
does not depend on how the update was cut into micro-batches. Does not own: the optimizer, the staleness check.

Shapes: B completions of a micro-batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncdapo.dapo import clipped_loss, importance_ratio, token_mean
from asyncdapo.learner.config import LossConfig
from asyncdapo.learner.model import token_logprobs
from asyncdapo.learner.packing import MicroBatch


@dataclass(frozen=True)
class TokenSums:
    """Sums over the loss-bearing tokens of an update; divided by `num_tokens` they are the step's metrics."""

    num_tokens: int
    loss: float
    entropy: float
    """Nats, at the sampling temperature."""
    ratio: float
    """π_θ / μ."""
    k3: float
    """r − 1 − log r with r = π_θ / μ, tokens drawn from μ: estimates KL(μ ‖ π_θ) in nats (Schulman's k3)."""
    clipped_low: float
    clipped_high: float
    clipped_dual: float


def accumulate_gradient(
    model: PreTrainedModel, micro_batches: Sequence[MicroBatch], loss: LossConfig, temperature: float
) -> TokenSums:
    """Add the gradient of the update's loss to `.grad`. One forward and one backward pass per micro-batch."""
    num_tokens = sum(int(micro_batch.loss_mask_BT.sum()) for micro_batch in micro_batches)
    sums = [_backward(model, micro.to(model.device), num_tokens, loss, temperature) for micro in micro_batches]
    return TokenSums(num_tokens, *torch.stack(sums).sum(0).tolist())


def _backward(
    model: PreTrainedModel, micro_batch: MicroBatch, num_tokens: int, loss: LossConfig, temperature: float
) -> Tensor:
    """Back-propagate this micro-batch's part of the loss; returns its token sums in the order of `TokenSums`."""
    mask_BT = micro_batch.loss_mask_BT
    logp_BT, entropy_BT = token_logprobs(model, micro_batch.tokens_BT, mask_BT, temperature)
    ratio_BT = importance_ratio(logp_BT, micro_batch.rollout_logprobs_BT, mask_BT)
    clipped = clipped_loss(
        ratio_BT,
        micro_batch.advantages_B[:, None],
        mask_BT,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip,
    )
    token_mean(clipped.loss_BT, num_tokens=num_tokens).backward()
    with torch.no_grad():
        k3_BT = torch.where(mask_BT, ratio_BT - 1 - (logp_BT - micro_batch.rollout_logprobs_BT), 0.0)
        measured = (
            clipped.loss_BT,
            entropy_BT,
            ratio_BT,
            k3_BT,
            clipped.clipped_low_BT,
            clipped.clipped_high_BT,
            clipped.clipped_dual_BT,
        )
        return torch.stack([values_BT.sum(dtype=torch.float64) for values_BT in measured])
