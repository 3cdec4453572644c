"""From a batch to rows: what one rank trains on, one row for each completion that has a gradient.

    Batch, Payload ──group_rows──▶ a Row for each completion of this rank that is computed, with its advantage
    Batch ──columns──▶ what every rank knows of every completion ──aggregation──▶ weight of each row in its update

A group is never cut: an optimizer update trains whole groups, and so does a rank in it. Completions that bear no loss
are left out of every forward pass, after they have counted in their group's mean and standard deviation. So are those
of advantage 0, whose gradient is exactly 0, unless the loss heeds them: they count in every denominator, which is made
of `Columns`. Does not own: micro-batches (`packing`), the loss, who trains on what (`shares`).

Shapes: N completions of the batch, G completions of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from asyncdapo.messages import Batch, Runs
from asyncdapo.payload import Payload

Advantage = Callable[[Tensor], Tensor]
"""Rewards of a group [G] -> advantages [G]."""


@dataclass(frozen=True)
class Row:
    """One completion to train on. Arrays are views on the payload: P prompt tokens, R response tokens."""

    index: int
    """Its place among the N completions of the batch."""
    group: int
    """Its group's place in the batch: rows of one group have the same prompt."""
    prompt_ids: np.ndarray
    """int32 [P]"""
    token_ids: np.ndarray
    """int32 [R]"""
    rollout_logprobs: np.ndarray
    """float32 [R]: μ, at the sampling temperature."""
    loss_mask: np.ndarray
    """bool [R]"""
    advantage: float
    staleness: int
    """Of its group, in train steps."""
    start_logprobs: np.ndarray | None = None
    """[R]: of the policy at the start of the train step; none where the loss needs none, or takes it from its own
    forward pass."""
    correction: np.ndarray | None = None
    """[R]: constant weight of each token's loss; none as with `start_logprobs`."""
    reference_logprobs: np.ndarray | None = None
    """[R]: of the reference model; none without a KL penalty."""
    weight: float = 1.0
    """What each of its tokens counts in the loss of its update."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def response(self) -> slice:
        """Where its response stands in its line of a rectangle."""
        return slice(len(self.token_ids))


@dataclass(frozen=True)
class Columns:
    """What every rank knows of every completion of the batch, int64 [N]: it makes the denominators of the loss."""

    group_N: Tensor
    """Its group's place in the batch."""
    num_tokens_N: Tensor
    """Its loss-bearing tokens."""
    copies_N: Tensor
    """How many times it stands in the batch."""

    def of_groups(self, groups: Iterable[int]) -> Tensor:
        """Indices of the completions of these groups, rising."""
        return torch.isin(self.group_N, torch.tensor(list(groups), dtype=torch.int64)).nonzero()[:, 0]


def group_rows(
    batch: Batch, payload: Payload, share: Sequence[int], advantage: Advantage, *, with_zeros: bool = True
) -> dict[int, list[Row]]:
    """The loss-bearing completions of each group of the share, with their advantages; those of advantage 0 only
    `with_zeros`. `payload` holds those groups in that order, `share` their indices."""
    first_of_group = np.cumsum([0, *(len(group.completions) for group in batch.groups)]).tolist()
    groups = [batch.groups[index] for index in share]
    rows: dict[int, list[Row]] = {}
    for place, group, part in zip(share, groups, payload.split(groups), strict=True):
        rewards_G = torch.tensor([completion.reward for completion in group.completions], dtype=torch.float64)
        scored = zip(group.completions, advantage(rewards_G).tolist(), strict=True)
        rows[place], end = [], 0
        for index, (completion, its_advantage) in enumerate(scored, first_of_group[place]):
            tokens = slice(end, end := end + completion.num_tokens)
            row = Row(
                index,
                place,
                part.prompt_ids,
                part.token_ids[tokens],
                part.logprobs[tokens],
                expand_mask(completion.loss_mask),
                its_advantage,
                staleness=group.staleness(batch.step),
            )
            if row.num_loss_tokens and (with_zeros or its_advantage):
                rows[place].append(row)
    return rows


def columns(batch: Batch) -> Columns:
    """From the headers alone."""
    copies = batch.copies or [0] * len(batch.groups)
    completions = [
        (place, sum(count for value, count in completion.loss_mask if value), 1 + more)
        for place, (group, more) in enumerate(zip(batch.groups, copies, strict=True))
        for completion in group.completions
    ]
    return Columns(*torch.tensor(completions, dtype=torch.int64).reshape(-1, 3).T)


def expand_mask(runs: Runs) -> np.ndarray:
    """bool [number of tokens] from run lengths `[(0 or 1, num_tokens), …]`."""
    values = np.array([value for value, _ in runs], dtype=bool)
    return np.repeat(values, [count for _, count in runs])


def weighted(rows: Iterable[Row], indices_N: Tensor, weights_N: Tensor) -> list[Row]:
    """The rows with the weights that their update gives them: `weights_N[i]` is that of completion `indices_N[i]`."""
    weights = dict(zip(indices_N.tolist(), weights_N.tolist(), strict=True))
    return [replace(row, weight=weights[row.index]) for row in rows]
