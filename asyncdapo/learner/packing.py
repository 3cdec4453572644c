"""From a batch to padded micro-batches: a deterministic function of the batch and a token budget.

In comes a `Batch` with its `Payload` (numpy views), out come `MicroBatch`es of torch tensors. A group is never cut: an
optimizer update trains whole groups. Completions that bear no loss are left out of every forward pass, after they have
counted in their group's mean and standard deviation. Does not own: the model, the loss, devices.

Shapes: B completions of a micro-batch, T tokens of its longest one (prompt and response; padded on the right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asyncdapo.dapo import group_advantage
from asyncdapo.messages import LOGPROB_DTYPE, Batch, Payload, Runs

PAD_ID = 0
"""Any valid token id: with causal attention what stands on the right changes nothing on the left."""


@dataclass(frozen=True)
class Row:
    """One completion to train on. Arrays are views on the payload: P prompt tokens, R response tokens."""

    prompt_ids: np.ndarray
    """int32 [P]"""
    token_ids: np.ndarray
    """int32 [R]"""
    rollout_logprobs: np.ndarray
    """float32 [R]: μ, at the sampling temperature."""
    loss_mask: np.ndarray
    """bool [R]"""
    advantage: float

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes. Column t belongs to token t; its log-prob comes from the model's output at t − 1."""

    tokens_BT: Tensor
    """int64; `PAD_ID` on the right."""
    loss_mask_BT: Tensor
    """bool; true at the response tokens that bear loss."""
    rollout_logprobs_BT: Tensor
    """float32; 0 at the prompt and the padding."""
    advantages_B: Tensor
    """float32"""

    @property
    def num_padded_tokens(self) -> int:
        return self.tokens_BT.numel()

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(
            tokens_BT=self.tokens_BT.to(device),
            loss_mask_BT=self.loss_mask_BT.to(device),
            rollout_logprobs_BT=self.rollout_logprobs_BT.to(device),
            advantages_B=self.advantages_B.to(device),
        )


def group_rows(batch: Batch, payload: Payload) -> list[list[Row]]:
    """The loss-bearing completions of each group of the batch, with their advantages, in the batch's order."""
    groups = []
    for group, part in zip(batch.groups, payload.split(batch.groups), strict=True):
        rewards_G = torch.tensor([completion.reward for completion in group.completions], dtype=torch.float64)
        rows, end = [], 0
        for completion, advantage in zip(group.completions, group_advantage(rewards_G).tolist(), strict=True):
            start, end = end, end + completion.num_tokens
            loss_mask = expand_mask(completion.loss_mask)
            if loss_mask.any():
                tokens, logprobs = part.token_ids[start:end], part.logprobs[start:end]
                rows.append(Row(part.prompt_ids, tokens, logprobs, loss_mask, advantage))
        groups.append(rows)
    return groups


def expand_mask(runs: Runs) -> np.ndarray:
    """bool [number of tokens] from run lengths `[(0 or 1, num_tokens), …]`."""
    values = np.array([value for value, _ in runs], dtype=bool)
    return np.repeat(values, [count for _, count in runs])


def mini_batches(groups: Sequence[list[Row]], num_updates: int) -> list[list[Row]]:
    """One list of rows per optimizer update: consecutive whole groups, equally many or one more in the first updates.

    Fewer lists than `num_updates` where there are fewer groups with rows than that.
    """
    groups = [rows for rows in groups if rows]
    size, extra = divmod(len(groups), num_updates)
    updates, end = [], 0
    for index in range(min(num_updates, len(groups))):
        start, end = end, end + size + (index < extra)
        updates.append([row for rows in groups[start:end] for row in rows])
    return updates


def micro_batches(rows: Sequence[Row], max_tokens: int) -> list[MicroBatch]:
    """Rows sorted by length, longest first, in as few padded rectangles of at most `max_tokens` tokens as that order
    allows; a row longer than that has a rectangle of its own."""
    rows = sorted(rows, key=lambda row: -row.num_tokens)
    packed, start = [], 0
    while start < len(rows):
        num_rows = max(1, max_tokens // rows[start].num_tokens)
        packed.append(pad(rows[start : start + num_rows]))
        start += num_rows
    return packed


def pad(rows: Sequence[Row]) -> MicroBatch:
    """Rows as the tensors of one forward pass."""
    shape = (len(rows), max(row.num_tokens for row in rows))
    tokens_BT = np.full(shape, PAD_ID, dtype=np.int64)
    loss_mask_BT = np.zeros(shape, dtype=bool)
    rollout_logprobs_BT = np.zeros(shape, dtype=LOGPROB_DTYPE)
    for index, row in enumerate(rows):
        response = slice(len(row.prompt_ids), row.num_tokens)
        tokens_BT[index, : len(row.prompt_ids)] = row.prompt_ids
        tokens_BT[index, response] = row.token_ids
        loss_mask_BT[index, response] = row.loss_mask
        rollout_logprobs_BT[index, response] = row.rollout_logprobs
    return MicroBatch(
        tokens_BT=torch.from_numpy(tokens_BT),
        loss_mask_BT=torch.from_numpy(loss_mask_BT),
        rollout_logprobs_BT=torch.from_numpy(rollout_logprobs_BT),
        advantages_B=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
    )
