"""The gradient of one optimizer update, and what is measured on the way.

    logp ──ratio to the anchor, clip──▶ policy loss of each token ──× correction──▶ + KL − entropy ──× row weight──▶ Σ

In come the rows of one update that this rank has, out goes d loss / d θ of the whole update, in `.grad` of the shards.
Invariant: every row carries what its tokens count in the whole update, known before the first backward pass; so parts
add up, and the gradient depends neither on the micro-batches nor on the ranks. Does not own: the optimizer, how
gradients are summed over ranks (`model/sharding`).

Shapes: B completions of a micro-batch, T tokens of its longest response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncdapo.algorithm.corrections import kl_penalty, loglinear_logprobs
from asyncdapo.algorithm.policy_loss import policy_loss
from asyncdapo.algorithm.variants import PolicyLoss
from asyncdapo.learner.batches.samples import Row
from asyncdapo.learner.config import LossConfig
from asyncdapo.learner.model.packing import MicroBatch, Work, micro_batches, pack
from asyncdapo.learner.model.policy import Policy
from asyncdapo.learner.model.sharding import before_backward
from asyncdapo.learner.step.diagnostics import Sums, measure
from asyncdapo.learner.step.frozen_logprobs import correct
from asyncdapo.learner.step.ranks import Ranks


@dataclass(frozen=True)
class Part:
    """What one rank's part of an update came to; parts add over ranks."""

    loss: float
    sums: Sums
    work: Work

    def summed(self, ranks: Ranks) -> Part:
        """Over all ranks, the same at each."""
        own = torch.tensor([self.loss, *self.work.counts], dtype=torch.float64)
        packed = ranks.sum(torch.cat([own, self.sums.packed]))
        loss, *counts = packed[: len(own)].tolist()
        return Part(loss, Sums(packed[len(own) :]), Work(*map(int, counts)))


Note = Callable[[Sequence[Row], Tensor], None]
"""Is told the rows of a pass and their log-probs [B, T]."""


def accumulate_gradient(
    policy: Policy,
    rows: Sequence[Row],
    loss: LossConfig,
    *,
    max_tokens: int,
    ranks: Ranks,
    scale: float = 1.0,
    note: Note | None = None,
) -> Part:
    """Make `.grad` of every shard the gradient of an update, of which this rank has these rows: the sum over all ranks.
    One forward and one backward pass for each micro-batch of at most `max_tokens` computed tokens, and as many at every
    rank, at least one. The gradient is times `scale`. Every rank has to call it. Returns this rank's part."""
    total, sums, work = torch.zeros((), dtype=torch.float64, device=policy.device), Sums.zeros(policy.device), Work()
    computed = [row for row in rows if row.num_loss_tokens]
    chunks = ranks.as_many(micro_batches(computed, max_tokens), at_least=1)
    for number, chunk in enumerate(chunks, 1):
        before_backward(policy, is_last=number == len(chunks))
        micro_batch = pack(chunk, policy.device)
        loss_of_part, measured, logp_BT = _backward(policy, micro_batch, loss, scale)
        if note:
            note(chunk, logp_BT)
        if chunk:
            total, sums, work = total + loss_of_part, sums + measured, work + micro_batch.work
    return Part(total.item(), sums.cpu(), work)


def _backward(policy: Policy, micro_batch: MicroBatch, loss: LossConfig, scale: float) -> tuple[Tensor, Sums, Tensor]:
    """Back-propagate this micro-batch's part of the loss; returns the part, its sums and its log-probs [B, T], all on
    the policy's device."""
    mask_BT = micro_batch.loss_mask_BT
    logp_BT, entropy_BT = policy(micro_batch, entropy_gradient=loss.entropy_coef > 0)
    # Without a first pass the policy at the start of the step is the one of this very forward pass.
    start_BT = logp_BT.detach() if micro_batch.start_logprobs_BT is None else micro_batch.start_logprobs_BT
    if loss.anchor == "loglinear":
        assert micro_batch.token_staleness_BT is not None, "the rows have it"
        start_BT = loglinear_logprobs(logp_BT, micro_batch.rollout_logprobs_BT, micro_batch.token_staleness_BT)
    losses = _policy_loss(loss, logp_BT, start_BT, entropy_BT, micro_batch)
    correction_BT, kl_BT = _correction(loss, start_BT, micro_batch), logp_BT.new_zeros(())
    loss_BT = losses.loss_BT * correction_BT
    if loss.kl_coef:
        assert micro_batch.reference_logprobs_BT is not None, "the first pass has computed them"
        kl_BT = kl_penalty(logp_BT, micro_batch.reference_logprobs_BT, mask_BT, loss.kl_estimator)
        loss_BT = loss_BT + loss.kl_coef * kl_BT
    if loss.entropy_coef:
        loss_BT = loss_BT - loss.entropy_coef * entropy_BT
    part = (loss_BT.sum(-1) * micro_batch.weights_B).sum()
    (part * scale).backward()
    return part.detach(), measure(micro_batch, losses, logp_BT, entropy_BT, correction_BT, kl_BT), logp_BT.detach()


def _policy_loss(
    loss: LossConfig, logp_BT: Tensor, start_logp_BT: Tensor, entropy_BT: Tensor, micro_batch: MicroBatch
) -> PolicyLoss:
    inputs = {"entropy_BT": entropy_BT} if loss.variant == "estr" else {}
    if loss.variant == "m2po":
        assert micro_batch.trusted_BT is not None, "fixed behind the first pass"
        inputs = {"trusted_BT": micro_batch.trusted_BT}
    anchor_BT = micro_batch.rollout_logprobs_BT if loss.anchor == "behavior" else start_logp_BT
    advantages_B1 = micro_batch.advantages_B[:, None]
    return policy_loss(
        loss.variant, logp_BT, anchor_BT, advantages_B1, micro_batch.loss_mask_BT, **inputs, **loss.numbers
    )


def _correction(loss: LossConfig, start_logp_BT: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Constant weight of each token's policy loss; 1 without a correction."""
    if loss.correction == "none":
        return start_logp_BT.new_ones(())
    if micro_batch.correction_BT is not None:
        return micro_batch.correction_BT
    return correct(loss, start_logp_BT, micro_batch).weights_BT
