"""Other ratios than DAPO's in the clipped loss. Pure torch, no state, no I/O.

    ppo     r_t of each token (`dapo.py`)
    gspo    s_i of the whole response: the geometric mean of its r_t, clipped (Zheng et al., 2025, arXiv 2507.18071)
    gmpo    the geometric mean of the clipped r_t of a response (Zhao et al., 2025, arXiv 2507.20673)
    cispo   a constant weight on log π_θ (MiniMax-M1, 2025, arXiv 2506.13585)

In: log-probs, advantages and the mask of some responses. Out: a `PolicyLoss`. What masks or gates stale tokens in the
place of the clip is in `trust_regions.py`; `policy_loss.py` finds a loss by its name.

Invariant: a position outside the mask may hold any finite value; it adds nothing to a loss, a gradient or a count.

Shapes: B completions of a forward pass, T tokens. What is said of single tokens also takes flat tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncdapo.algorithm.dapo import MAX_LOG_RATIO, ClippedLoss, clipped_loss, importance_ratio


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(ClippedLoss):
    """Loss of each token before averaging, which tokens each bound acts on, and the ratio they were judged by.

    Where a weight is clipped and not a loss (`cispo`), clipped tokens keep a gradient, whatever their advantage.
    """

    ratio_BT: Tensor
    """0 outside the mask."""
    untrusted_BT: Tensor | None = None
    """Tokens outside of a trust region that stands beside the clip: no loss and no gradient, whatever their advantage.
    None where the loss has no such region."""
    gate_BT: Tensor | None = None
    """What a soft gate leaves of each token's gradient, 0 outside the mask; None where the loss has none."""


def clipped_policy_loss(
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> PolicyLoss:
    """The clipped loss of any ratio."""
    clipped = clipped_loss(
        ratio_BT, advantages_BT, mask_BT, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    return PolicyLoss(**vars(clipped), ratio_BT=ratio_BT)


def ppo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """The paper's loss (`dapo.py`)."""
    ratio_BT = importance_ratio(logp_BT, old_logp_BT, mask_BT)
    return clipped_policy_loss(
        ratio_BT, advantages_BT, mask_BT, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )


def gspo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """The clipped loss of s_i at every token of its response (GSPO, eq. 5 and 7)."""
    ratio_BT = torch.where(mask_BT, response_ratio(logp_BT, old_logp_BT, mask_BT, geometric=True), 0.0)
    return clipped_policy_loss(
        ratio_BT, advantages_BT, mask_BT, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )


def response_ratio(logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor, *, geometric: bool) -> Tensor:
    """π_θ / π_old of each whole response, [B, 1]: the product of its tokens' ratios, or their geometric mean.

    1 for a response without a token. The gradient reaches every token of the response.
    """
    log_ratio_B1 = torch.where(mask_BT, logp_BT - old_logp_BT, 0.0).sum(-1, keepdim=True)
    if geometric:
        log_ratio_B1 = log_ratio_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    return log_ratio_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def gmpo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> PolicyLoss:
    """−Â s_i at every token of response i, where s_i = exp(mean_t c_t) and c_t is the clipped log ratio of a token:
    min(log r_t, ε_high) if Â > 0, max(log r_t, −ε_low) if Â < 0 (GMPO; its e^−0.4 and e^0.4 are the defaults).

    The clip is of each token and in log space, before the mean; GSPO clips the mean. A clipped token has no gradient.
    """
    log_ratio_BT = torch.where(mask_BT, logp_BT - old_logp_BT, 0.0)
    rising_BT = (advantages_BT > 0).expand_as(log_ratio_BT)
    clipped_BT = torch.where(rising_BT, log_ratio_BT.clamp(max=clip_high), log_ratio_BT.clamp(min=-clip_low))
    mean_B1 = clipped_BT.sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    ratio_BT = torch.where(mask_BT, mean_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), 0.0)
    return PolicyLoss(
        ratio_BT=ratio_BT,
        loss_BT=torch.where(mask_BT, -advantages_BT * ratio_BT, 0.0),
        clipped_low_BT=mask_BT & (advantages_BT < 0) & (log_ratio_BT < -clip_low),
        clipped_high_BT=mask_BT & rising_BT & (log_ratio_BT > clip_high),
        clipped_dual_BT=torch.zeros_like(mask_BT),
    )


def cispo_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, *, clip_low: float, clip_high: float
) -> PolicyLoss:
    """−clip(r_t, 1 − ε_low, 1 + ε_high) Â log π_θ with the clipped ratio as a constant (MiniMax-M1, eq. 4 and 5).

    A clipped token keeps its gradient, unlike under `clipped_loss`. ε_low = 1 leaves the ratio unbounded below.
    """
    ratio_BT = importance_ratio(logp_BT, old_logp_BT, mask_BT)
    constant_BT = ratio_BT.detach().clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    return PolicyLoss(
        ratio_BT=ratio_BT,
        loss_BT=-torch.where(mask_BT, constant_BT, 0.0) * logp_BT,
        clipped_low_BT=mask_BT & (ratio_BT < 1 - clip_low),
        clipped_high_BT=mask_BT & (ratio_BT > 1 + clip_high),
        clipped_dual_BT=torch.zeros_like(mask_BT),
    )
