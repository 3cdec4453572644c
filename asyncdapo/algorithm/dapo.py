"""The DAPO loss as the paper states it (Yu et al., 2025, arXiv 2503.14476). Pure torch, no state, no I/O.

    reward      R = R_correct + R_length                               soft overlong punishment, eq. 13
    advantage   Â_i = (R_i − mean(R)) / std(R)                         within the group of one prompt, eq. 9
    ratio       r_t = π_θ(o_t | q, o_<t) / π_old(o_t | q, o_<t)        eq. 9
    objective   J = 1/N Σ_t min(r_t Â, clip(r_t, 1 − ε_low, 1 + ε_high) Â)                 over N tokens, eq. 8

`loss = −J` is to be minimised. Eq. 8 is written for one prompt; N here counts the tokens of all prompts of an optimizer
update. `π_old` is the policy the ratio is taken against: the learner passes the one that sampled the tokens. Dual clip
(Ye et al., 2020, arXiv 1912.09729) is optional and not part of the paper.

    rewards_G = torch.tensor([1.0, -1.0, -1.0, 1.0])
    rewards_G += soft_overlong_punishment(mask_BT.sum(-1), max_length=20480, buffer=4096, penalty=1.0)
    advantages_BT = group_advantage(rewards_G)[:, None]
    ratio_BT = importance_ratio(logp_BT, old_logp_BT, mask_BT)
    clipped = clipped_loss(ratio_BT, advantages_BT, mask_BT)
    weights_B = token_mean_weights(mask_BT.sum(-1))
    loss = (weights_B[:, None] * clipped.loss_BT).sum()

Invariant: a position outside the mask may hold any finite value; it adds nothing to a loss, a gradient or a count.

Shapes: G completions of one prompt, B completions of a forward pass, N completions of an optimizer update, T tokens.
Advantages may have any shape that broadcasts with the log-probs, so ratio and loss also take flat tokens. Log-probs are
natural logarithms, lengths are in tokens. Does not own: masks, corrections for stale tokens (`corrections.py`),
other ratios, advantages and averages (files of these names); each function can be replaced alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""|log ratio| beyond this is clamped, so that exp can't overflow; the gradient there is zero."""


@dataclass(frozen=True)
class ClippedLoss:
    """Loss of each token before averaging, and which tokens each bound acts on (False outside the mask)."""

    loss_BT: Tensor
    clipped_low_BT: Tensor
    """Negative advantage and ratio below 1 − ε_low: no gradient."""
    clipped_high_BT: Tensor
    """Positive advantage and ratio above 1 + ε_high: no gradient."""
    clipped_dual_BT: Tensor
    """Negative advantage and loss above the dual bound: no gradient."""


def soft_overlong_punishment(lengths_N: Tensor, *, max_length: int, buffer: int, penalty: float) -> Tensor:
    """The punishment added to the reward of a response of this length, float64 [N] (eq. 13).

    0 up to `max_length − buffer`, falling linearly to `−penalty` at `max_length`, and `−penalty` beyond. Without a
    buffer there is no ramp: only what is longer than `max_length` is punished.
    """
    left_N = (max_length - buffer) - lengths_N.double()
    return penalty * (left_N / max(buffer, 1)).clamp(-1, 0)


def group_advantage(rewards_G: Tensor, eps: float = 1e-6) -> Tensor:
    """Advantage of each completion within the group of its prompt, [G] (eq. 9).

    The standard deviation divides by G − 1. A group of one, or of equal rewards, teaches nothing: exactly 0.
    """
    if rewards_G.max() == rewards_G.min():
        return torch.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) / (rewards_G.std(correction=1) + eps)


def importance_ratio(logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """π_θ / π_old of each token, [B, T] (eq. 9); 0 outside the mask. `mask_BT` is bool.

    The clamp is also needed outside the mask: an exp that overflows there would give a gradient of 0 · inf = NaN.
    """
    log_ratio_BT = (logp_BT - old_logp_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(mask_BT, log_ratio_BT.exp(), 0.0)


def clipped_loss(
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
) -> ClippedLoss:
    """Clipped loss of each token (eq. 8, with the two clip widths of §3.1); 0 outside the mask.

    `dual_clip` bounds the loss of a negative advantage at `−Â · dual_clip`, where it otherwise grows with the ratio.
    """
    unclipped_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    loss_BT = torch.maximum(unclipped_BT, clipped_BT)

    negative_BT = mask_BT & (advantages_BT < 0)
    above_dual_BT = torch.zeros_like(negative_BT)
    if dual_clip is not None:
        bound_BT = -advantages_BT * dual_clip
        above_dual_BT = negative_BT & (loss_BT > bound_BT)
        loss_BT = torch.where(above_dual_BT, bound_BT, loss_BT)
    return ClippedLoss(
        loss_BT=torch.where(mask_BT, loss_BT, 0.0),
        clipped_low_BT=negative_BT & (ratio_BT < 1 - clip_low),
        clipped_high_BT=mask_BT & (advantages_BT > 0) & (ratio_BT > 1 + clip_high),
        clipped_dual_BT=above_dual_BT,
    )


def token_mean_weights(num_tokens_N: Tensor) -> Tensor:
    """Weight of each token of a completion in the loss of its update, float64 [N]: 1 / Σ tokens, whatever the length of
    its completion (eq. 8; §3.3 says why not per sequence).

    `num_tokens_N`: masked-in tokens of every completion of the whole update, on all ranks and in all micro-batches,
    which therefore add up to one mean: `loss = Σ_i weights_i Σ_t loss_it`. Without any token the loss is 0.
    """
    return torch.full_like(num_tokens_N, 1 / max(1, int(num_tokens_N.sum())), dtype=torch.float64)
