"""A loss with a soft gate instead of a clip, and an average between token-mean and seq-mean-token-mean.

loss.variant=examples/loss.py:soft_gate  loss.agg=examples/loss.py:root_length
"""

import torch
from torch import Tensor

from asyncdapo.algorithm.averages import UpdateCounts

SHARPNESS = 4.0


def soft_gate(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """A sigmoid of the ratio: the gradient is the plain one where the ratio is 1, and fades out on both sides."""
    ratio_BT = torch.where(mask_BT, logp_BT - old_logp_BT, 0.0).clamp(-20, 20).exp()
    return -torch.sigmoid(SHARPNESS * (ratio_BT - 1)) * (4 / SHARPNESS) * advantages_BT


def root_length(counts: UpdateCounts) -> Tensor:
    """A response of n tokens counts as √n; the weights of all tokens of an update add up to 1."""
    lengths_N = counts.num_tokens_N.double()
    total = (counts.copies_N * lengths_N.sqrt()).sum().clamp(min=1)
    return 1 / lengths_N.clamp(min=1).sqrt() / total
