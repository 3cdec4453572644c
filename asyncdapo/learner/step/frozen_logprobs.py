"""What is fixed before the first backward pass of a train step: masks, correction weights, log-probs of other policies.

In: the rows of a rank. Out: the same rows with π_start, the policy at the start of the step (it is the proximal policy
of `loss.anchor: proximal`), the correction weights and masks that follow from π_start / μ, and the log-probs of the
reference model. Each is computed by forward passes without gradient, and only where the loss needs it. M2PO's mask
follows from all tokens of an update: each rank sends (log π_start / μ)² of its own to the others, 8 bytes a token.

Invariant: a mask is final before the first backward pass, so every denominator of the step is known by then. Without
masks, and with a single update, π_start is the policy of that update's own forward pass: then no pass is spent on it.
Does not own: the formulas (`corrections`), the gradient (`gradient`).

Shapes: B completions of a micro-batch, T tokens of its longest response; N completions of the batch, n loss-bearing
tokens of an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from asyncdapo.algorithm.corrections import Correction, correction_weights, second_moment_limit
from asyncdapo.learner.batches.samples import Columns, Row
from asyncdapo.learner.config import LossConfig
from asyncdapo.learner.model.packing import MicroBatch, micro_batches, pack
from asyncdapo.learner.model.policy import Policy
from asyncdapo.learner.step.ranks import Ranks


@dataclass(frozen=True)
class FirstPass:
    """The passes of one learner. `max_tokens`: computed tokens in one forward pass."""

    policy: Policy
    reference: Policy | None
    loss: LossConfig
    max_tokens: int
    ranks: Ranks

    def __call__(self, rows: Sequence[Row], num_updates: int) -> list[Row]:
        """The rows in any order, those included whose tokens are all masked now. `num_updates` are still to come in
        this step. Every rank has to call it."""
        loss = self.loss
        masks = loss.masks_by_policy or loss.m2po_threshold is not None
        of_policy = masks or (loss.anchor == "proximal" and num_updates > 1)
        if not of_policy and self.reference is None:
            return list(rows)
        done: list[Row] = []
        for chunk in self.ranks.as_many(micro_batches(rows, self.max_tokens)):
            micro_batch = pack(chunk, self.policy.device)
            if of_policy:
                chunk = self._of_policy(chunk, micro_batch)
            if self.reference is not None:
                logp_BT = _on_host(_logprobs(self.reference, micro_batch))
                lines = zip(chunk, logp_BT, strict=bool(chunk))
                chunk = [replace(row, reference_logprobs=logp_T[row.response]) for row, logp_T in lines]
            done += chunk
        return done

    def _of_policy(self, chunk: Sequence[Row], micro_batch: MicroBatch) -> list[Row]:
        logp_BT = _logprobs(self.policy, micro_batch)
        corrected = correct(self.loss, logp_BT, micro_batch)
        found = map(_on_host, (logp_BT, corrected.weights_BT, corrected.mask_BT))
        return [
            replace(
                row,
                start_logprobs=logp_T[row.response],
                correction=weights_T[row.response],
                loss_mask=mask_T[row.response],
            )
            for row, logp_T, weights_T, mask_T in zip(chunk, *found, strict=bool(chunk))
        ]


def second_moment_masked(
    rows: Sequence[Row], indices_N: Tensor, counted: Columns, threshold: float, ranks: Ranks
) -> list[Row]:
    """The rows with M2PO's mask. They are those that this rank has of an update, behind the first pass; `indices_N` are
    the update's completions. Every token has one place among those of the update, so that the mask depends neither on
    micro-batches nor on ranks. Every rank has to call it."""
    num_tokens_N = counted.num_tokens_N[indices_N]
    starts_N = num_tokens_N.cumsum(0) - num_tokens_N
    places = dict(zip(indices_N.tolist(), starts_N.tolist(), strict=True))
    squares_n = torch.zeros(int(num_tokens_N.sum()), dtype=torch.float64)
    for row in sorted(rows, key=lambda row: row.context):
        begin = places[row.index]
        places[row.index] = end = begin + row.num_loss_tokens
        squares_n[begin:end] = torch.from_numpy(_squares(row)[row.loss_mask])
    counts_n = counted.copies_N[indices_N].repeat_interleave(num_tokens_N)
    limit = second_moment_limit(ranks.sum(squares_n), counts_n, threshold)
    return [replace(row, trusted=~(_squares(row) >= limit)) for row in rows]


def _squares(row: Row) -> np.ndarray:
    """float64 [R]"""
    assert row.start_logprobs is not None, "the first pass has computed them"
    return np.square(row.start_logprobs.astype(np.float64) - row.rollout_logprobs)


def correct(loss: LossConfig, start_logp_BT: Tensor, micro_batch: MicroBatch) -> Correction:
    """Weights and masks by π_start / μ, as the config has them."""
    assert loss.correction is not None, "LossConfig settles it"
    return correction_weights(
        start_logp_BT,
        micro_batch.rollout_logprobs_BT,
        micro_batch.loss_mask_BT,
        level=loss.correction,
        mode=loss.correction_mode,
        band=loss.correction_band,
        outlier_band=loss.outlier_band,
        outlier_scope=loss.outlier_scope,
    )


@torch.no_grad()
def _logprobs(policy: Policy, micro_batch: MicroBatch) -> Tensor:
    logp_BT, _ = policy(micro_batch)
    return logp_BT


def _on_host(values_BT: Tensor) -> np.ndarray:
    return values_BT.cpu().numpy()
