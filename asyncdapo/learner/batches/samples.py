"""From a batch to rows: one rank gets a row for each context of its completions that has a gradient.

    Batch, Payloads ──rows_by_update──▶ a Row for each context of this rank that is computed, with its advantage
    Batch ──columns──▶ what every rank knows about every completion ──aggregation──▶ weight of each row in its update

A completion has one advantage, and its tokens are counted over all its contexts: however often an episode forked, it
counts as one. Observed tokens are read and bear no loss, as if they were prompt: they are in no numerator and no
denominator. What is about sequences (`loss.variant: gspo`, a correction of sequences) is about contexts.

An optimizer update trains whole groups; their completions may be at several ranks. A completion that bears no loss is
at no rank, but its reward counts in the mean and the standard deviation of its group. A completion of advantage 0 has a
gradient of exactly 0. It is left out of every forward pass, unless the loss needs it, and still counts in every
denominator, since those are made of `Columns`. Does not own: micro-batches (`packing`), the loss, who trains on what
(`shares`).

Shapes: N completions of the batch, G completions of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from asyncdapo.algorithm.advantages import OfBatch
from asyncdapo.shares import Batch, share_of
from asyncdapo.transport.payload import ContextTokens, Payload, Support, expand


@dataclass(frozen=True)
class Row:
    """One context to train on: P prompt tokens, R tokens behind them, called the response, sampled and observed."""

    index: int
    """Place of its completion among the N of the batch."""
    prompt: int
    """Number of its prompt: rows with the same number have the same prompt tokens."""
    prompt_ids: np.ndarray
    """int32 [P]"""
    token_ids: np.ndarray
    """int32 [R]"""
    rollout_logprobs: np.ndarray
    """float32 [R]: μ, at the sampling temperature; 0 of an observed token."""
    loss_mask: np.ndarray
    """bool [R]; false at every observed token."""
    advantage: float
    staleness: int
    """Of its group, in train steps."""
    context: int = 0
    """Place of the context in its completion."""
    start_logprobs: np.ndarray | None = None
    """[R]: of the policy at the start of the train step. None where the loss needs none, or takes them from the forward
    pass of its own update."""
    correction: np.ndarray | None = None
    """[R]: constant weight of each token's loss; None as with `start_logprobs`."""
    trusted: np.ndarray | None = None
    """bool [R]: false where `loss.variant: m2po` masks; None under others."""
    token_staleness: np.ndarray | None = None
    """int32 [R]: of each token, in train steps; 0 of an observed one. None unless asked for."""
    reference_logprobs: np.ndarray | None = None
    """[R]: of the reference model; None without a KL penalty."""
    support: Support | None = None
    """[R]: which tokens each was drawn from; None is the whole vocabulary, as it is of an observed token."""
    weight: float = 1.0
    """Weight of each of its tokens in the loss of its update."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def response(self) -> slice:
        """Columns of its response in a line of [B, T]."""
        return slice(len(self.token_ids))


@dataclass(frozen=True)
class Columns:
    """What every rank knows about every completion of the batch, int64 [N]. The loss takes its denominators from it."""

    group_N: Tensor
    """Its group's place in the batch."""
    update_N: Tensor
    """The optimizer update that its group is in; NOBODY for none."""
    num_tokens_N: Tensor
    """Its loss-bearing tokens."""
    copies_N: Tensor
    """How many times it counts."""

    def of_update(self, number: int) -> Tensor:
        """Indices of the completions of all groups of this update, rising."""
        return (self.update_N == number).nonzero()[:, 0]


def rows_by_update(
    batch: Batch,
    payloads: Sequence[Payload],
    rank: int,
    advantages_of: OfBatch,
    *,
    with_zeros: bool = True,
    with_token_staleness: bool = False,
) -> list[list[Row]]:
    """The rows of this rank in each optimizer update, with their advantages; those of advantage 0 only `with_zeros`.
    `payloads`: of the pieces of the rank's share, in order."""
    first_of_group = np.cumsum([0, *(len(group.completions) for group in batch.groups)]).tolist()
    share = share_of(batch, rank)
    rewards = [
        torch.tensor([completion.reward for completion in group.completions], dtype=torch.float64)
        for group in batch.groups
    ]
    advantages = [one.tolist() for one in advantages_of(rewards, _times(batch))] if rewards else []
    rows: list[list[Row]] = [[] for _ in range(batch.deal.num_updates)]
    prompts: dict[tuple[int, bytes], int] = {}
    for piece, part in zip(share, payloads, strict=True):
        group = batch.groups[piece.place]
        staleness = group.staleness(batch.step)
        for tokens in part.of_contexts(piece.header):
            index, response = piece.indices[tokens.index], tokens.response
            row = Row(
                first_of_group[piece.place] + index,
                prompts.setdefault((piece.place, tokens.prompt_ids.tobytes()), len(prompts)),
                tokens.prompt_ids,
                tokens.own_ids[response],
                tokens.spread(tokens.logprobs_S)[response],
                tokens.spread(expand(tokens.header.loss_mask) == 1)[response],
                advantages[piece.place][index],
                staleness=staleness,
                context=tokens.number,
                support=_support(tokens),
            )
            if with_token_staleness:
                staleness_S = (batch.step - 1 - expand(tokens.header.versions)).astype(np.int32)
                row = replace(row, token_staleness=tokens.spread(staleness_S)[response])
            if with_zeros or row.advantage:
                rows[batch.deal.updates[piece.place]].append(row)
    return rows


def _support(tokens: ContextTokens) -> Support | None:
    """Of the response. Only sampled tokens have one, and all of them are in the response."""
    if tokens.support_S is None:
        return None
    return Support(tokens.spread(tokens.support_S.counts)[tokens.response], tokens.support_S.token_ids)


def columns(batch: Batch) -> Columns:
    """From the headers alone."""
    completions = [
        (place, update, completion.num_loss_tokens, times)
        for place, (group, update, times) in enumerate(
            zip(batch.groups, batch.deal.updates, _times(batch), strict=True)
        )
        for completion in group.completions
    ]
    return Columns(*torch.tensor(completions, dtype=torch.int64).reshape(-1, 4).T)


def _times(batch: Batch) -> list[int]:
    """How often each group counts."""
    return [1 + more for more in batch.copies or [0] * len(batch.groups)]


def weighted(rows: Iterable[Row], indices_N: Tensor, weights_N: Tensor) -> list[Row]:
    """The rows with their weights in an update: `weights_N[i]` is the weight of completion `indices_N[i]`."""
    weights = dict(zip(indices_N.tolist(), weights_N.tolist(), strict=True))
    return [replace(row, weight=weights[row.index]) for row in rows]
