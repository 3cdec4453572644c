"""Corrections beside the clipped loss: weights for stale tokens, the KL penalty, and measures of their distance.

    weights     w_t = π_θ / μ, where μ sampled the tokens and π_θ is the policy at the start of the train step
                token       of each token: truncated, TIS (Yao et al., 2025); masked outside a band, IcePop (Ling, 2025)
                sequence    of the whole response, the product of its tokens' ratios
                geometric   of the whole response, their geometric mean
    outliers    tokens, or responses with a token, whose w_t lies outside a band of its own are masked first
    2nd moment  the largest (log w_t)² of an update, until the mean of the others is low (M2PO; Zheng, 2025, 2510.01161)
    decoupled   loss_t = w_t · clipped loss_t around π_prox (Hilton et al., 2021, arXiv 2110.00641; AReaL, 2505.24298)
    loglinear   log π_prox ≈ log μ + (1 − 1/d) (log π_θ − log μ), d versions later (A-3PO; Li et al., 2025, 2512.06547)
    KL          k1, k2, k3 of KL(π_θ ‖ π_ref) (Schulman, "Approximating KL divergence", 2020)
    ESS, χ²     functions of sums, so that micro-batches and ranks can add up theirs first

    correction = correction_weights(
        prox_logp_BT, rollout_logp_BT, mask_BT, level="token", mode="truncate", band=(0.0, 2.0)
    )
    policy = policy_loss("ppo", logp_BT, prox_logp_BT, advantages_BT, correction.mask_BT, clip_low=0.2, clip_high=0.28)
    loss_BT = correction.weights_BT * policy.loss_BT

Invariants: a position outside the mask may hold any finite value; it adds nothing to a loss, a gradient or a count.
Weights are constants: no gradient passes through them, and denominators don't count them. Denominators do count masks,
which are fixed before the tokens of an update are counted.

Pure torch, no state, no I/O. Shapes: B completions, T tokens; flat tokens will do where nothing is asked of whole
responses; n tokens of an update. Log-probs are natural logarithms. Does not own: which log-probs are compared,
averages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from asyncdapo.algorithm.dapo import importance_ratio
from asyncdapo.algorithm.variants import response_ratio

Level = Literal["none", "token", "sequence", "geometric"]
Band = tuple[float, float]
"""Smallest and largest ratio, both inside."""


@dataclass(frozen=True)
class Correction:
    """Weights of the tokens that are left; all three [B, T]."""

    weights_BT: Tensor
    """No gradient; 0 where `mask_BT` is false."""
    mask_BT: Tensor
    """The mask passed in, less the tokens masked here."""
    truncated_BT: Tensor
    """Tokens left whose weight was cut to the upper end of the band."""


@torch.no_grad()
def correction_weights(
    logp_BT: Tensor,
    rollout_logp_BT: Tensor,
    mask_BT: Tensor,
    *,
    level: Level,
    mode: Literal["truncate", "mask"] = "truncate",
    band: Band = (0.0, 2.0),
    outlier_band: Band | None = None,
    outlier_scope: Literal["token", "sequence"] = "token",
) -> Correction:
    """Weights π_θ / μ of stale tokens, and the tokens left.

    First, tokens whose own ratio is outside `outlier_band` are masked, or their whole responses. Then `truncate` cuts
    weights above `band` to its upper end (it has no lower one), and `mask` masks tokens outside `band`. A response's
    weight is that of all its tokens in `mask_BT`, outliers included: it says how likely the sampled response has
    become. With level `none` all weights are 1, and `mode` and `band` are ignored.
    """
    token_ratio_BT = importance_ratio(logp_BT, rollout_logp_BT, mask_BT)
    left_BT = mask_BT
    if outlier_band is not None:
        outlier_BT = mask_BT & ~_inside(token_ratio_BT, outlier_band)
        if outlier_scope == "sequence":
            outlier_BT = outlier_BT.any(-1, keepdim=True)
        left_BT = mask_BT & ~outlier_BT

    if level == "none":
        return _correction(torch.ones_like(token_ratio_BT), left_BT)
    if level == "token":
        weights_BT = token_ratio_BT
    else:
        ratio_B1 = response_ratio(logp_BT, rollout_logp_BT, mask_BT, geometric=level == "geometric")
        weights_BT = ratio_B1.expand_as(token_ratio_BT)
    if mode == "mask":
        return _correction(weights_BT, left_BT & _inside(weights_BT, band))
    return _correction(weights_BT, left_BT, cap=band[1])


def _inside(ratio_BT: Tensor, band: Band) -> Tensor:
    """NaN counts as inside: it must reach the loss, where it is detected, and not be masked as an outlier."""
    return ~((ratio_BT < band[0]) | (ratio_BT > band[1]))


def _correction(weights_BT: Tensor, left_BT: Tensor, cap: float = float("inf")) -> Correction:
    return Correction(
        weights_BT=torch.where(left_BT, weights_BT.clamp(max=cap), 0.0),
        mask_BT=left_BT,
        truncated_BT=left_BT & (weights_BT > cap),
    )


def second_moment_limit(squares_n: Tensor, counts_n: Tensor, threshold: float) -> float:
    """The least (log r_t)² that M2PO masks in an update, inf if it masks none: with all tokens below it the mean is at
    most `threshold`, and no larger part of the sorted tokens has that. `counts_n`: how often each counts. Equal squares
    are masked together, so that the result depends on no order."""
    order_n = squares_n.argsort()
    sorted_n, sorted_counts_n = squares_n[order_n], counts_n[order_n].double()
    fits_n = (sorted_n * sorted_counts_n).cumsum(0) <= threshold * sorted_counts_n.cumsum(0)
    return math.inf if bool(fits_n.all()) else sorted_n[int(fits_n.sum())].item()


@torch.no_grad()
def loglinear_logprobs(logp_BT: Tensor, rollout_logp_BT: Tensor, staleness_BT: Tensor) -> Tensor:
    """Log-probs of a proximal policy one version behind π_θ, on the line between μ and π_θ, [B, T]; a constant.

    `staleness_BT`: d, the versions between the weights that sampled a token and those of π_θ; its proximal policy is μ
    itself for d = 1, and for d = 0, where there is nothing in between.
    """
    return rollout_logp_BT + (1 - 1 / staleness_BT.clamp(min=1)) * (logp_BT - rollout_logp_BT)


def kl_penalty(logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate of KL(π_θ ‖ π_ref) at each token, in nats, [B, T]; 0 outside the mask. With d = log π_θ − log π_ref, for
    tokens drawn from π_θ:

        k1 = d              unbiased; its gradient has mean 0, so that as a loss it only adds noise
        k2 = d² / 2         biased; its gradient is that of the KL
        k3 = e^−d − 1 + d   unbiased and never negative

    Nothing is clamped: the k3 of a token that π_θ nearly rules out may be very large.
    """
    log_ratio_BT = torch.where(mask_BT, logp_BT - ref_logp_BT, 0.0)
    if estimator == "k1":
        return log_ratio_BT
    if estimator == "k2":
        return log_ratio_BT.square() / 2
    return torch.expm1(-log_ratio_BT) + log_ratio_BT


def effective_sample_size(sum_w: float, sum_w2: float, num: float) -> float:
    """(Σ w)² / (n Σ w²): share of n tokens that would carry as much information with equal weights, 0..1 (Kong, 1992).

    1 when all weights are equal; 0 when nothing is left.
    """
    scale = num * sum_w2
    return sum_w**2 / scale if scale else 0.0


def chi2(sum_w2: float, num: float) -> float:
    """mean(w²) − 1: estimate of χ²(π_θ ‖ μ) from n untruncated ratios, of tokens or of responses; 0 for none."""
    return sum_w2 / num - 1 if num else 0.0
