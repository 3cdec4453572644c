"""From rows to padded micro-batches: a deterministic function of the rows and a token budget.

Does not own: the model, the loss, devices.

Shapes: N completions of the batch, B completions of a micro-batch, T tokens of its longest one (prompt and response;
padded on the right).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asyncdapo.learner.rows import Row

PAD_ID = 0
"""Any valid token id: with causal attention what stands on the right changes nothing on the left."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes. Column t belongs to token t; its log-prob comes from the model's output at t − 1."""

    tokens_BT: Tensor
    """int64; `PAD_ID` on the right."""
    loss_mask_BT: Tensor
    """bool; true at the response tokens that bear loss."""
    rollout_logprobs_BT: Tensor
    """As the following ones: 0 at the prompt and the padding."""
    start_logprobs_BT: Tensor | None
    correction_BT: Tensor | None
    reference_logprobs_BT: Tensor | None
    advantages_B: Tensor
    weights_B: Tensor
    staleness_B: Tensor
    """int64"""

    @property
    def num_padded_tokens(self) -> int:
        return self.tokens_BT.numel()


def chunks(rows: Sequence[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Rows sorted by length, longest first, in as few padded rectangles of at most `max_tokens` tokens as that order
    allows; a row longer than that has a rectangle of its own."""
    rows = sorted(rows, key=lambda row: -row.num_tokens)
    start = 0
    while start < len(rows):
        num_rows = max(1, max_tokens // rows[start].num_tokens)
        yield rows[start : start + num_rows]
        start += num_rows


def pad(rows: Sequence[Row], device: torch.device) -> MicroBatch:
    """Rows as the tensors of one forward pass."""
    shape = (len(rows), max(row.num_tokens for row in rows))
    tokens_BT = np.full(shape, PAD_ID, dtype=np.int64)
    loss_mask_BT = np.zeros(shape, dtype=bool)
    for index, row in enumerate(rows):
        tokens_BT[index, : len(row.prompt_ids)] = row.prompt_ids
        tokens_BT[index, row.response] = row.token_ids
        loss_mask_BT[index, row.response] = row.loss_mask

    def responses(values: Sequence[np.ndarray | None]) -> Tensor | None:
        if values[0] is None:
            return None
        padded_BT = np.zeros(shape, dtype=values[0].dtype)
        for index, (row, of_row) in enumerate(zip(rows, values, strict=True)):
            padded_BT[index, row.response] = of_row
        return torch.from_numpy(padded_BT).to(device)

    return MicroBatch(
        tokens_BT=torch.from_numpy(tokens_BT).to(device),
        loss_mask_BT=torch.from_numpy(loss_mask_BT).to(device),
        rollout_logprobs_BT=responses([row.rollout_logprobs for row in rows]),
        start_logprobs_BT=responses([row.start_logprobs for row in rows]),
        correction_BT=responses([row.correction for row in rows]),
        reference_logprobs_BT=responses([row.reference_logprobs for row in rows]),
        advantages_B=torch.tensor([row.advantage for row in rows], dtype=torch.float32, device=device),
        weights_B=torch.tensor([row.weight for row in rows], dtype=torch.float64, device=device),
        staleness_B=torch.tensor([row.staleness for row in rows], dtype=torch.int64, device=device),
    )
