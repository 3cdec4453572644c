"""Losses for stale data: what masks or gates a token in the place of the clip. Pure torch, no state, no I/O.

r_t = π_θ / π_old of a token, W the product of r_t over its response, H_t the entropy at its place:

    m2po     −M_t r_t Â       M_t masks the largest (log r_t)² of the update, until the mean of the others is at most τ
                              (second-moment trust; Zheng et al., 2025, arXiv 2510.01161)
    dppo_tv  −M_t r_t Â       M_t masks a token on its way out of |π_θ − π_old| ≤ δ
    dppo_kl                   … out of KL(π_old ‖ π_θ) ≤ δ, of this token against all others
                              (binary divergences of Qi et al., 2026, arXiv 2602.04879)
    estr     M_t clipped loss M_t = 1 where (log r_t)² / (H_t + ε) ≤ τ (Zhao et al., 2026, arXiv 2607.22186)
    sapo     −f(r_t) Â        f(r) = 4/τ · σ(τ (r − 1)), τ by the sign of Â (Gao et al., 2025, arXiv 2511.20347)
    vespo    −φ(W) Â log π_θ  φ(W) = W^k e^(λ (1 − W)), a constant; k, λ by the sign of Â (arXiv 2602.10693)

In all of them a token without loss still counts in every denominator, as in the papers. Which policy the ratio is taken
against is the caller's choice; the papers' is the one that sampled.

In: log-probs, advantages and the mask of some responses. Out: a `PolicyLoss`. Invariant: a position outside the mask
may hold any finite value; it adds nothing to a loss, a gradient or a count. NaN in the mask is never masked: it has to
reach the loss, where it is detected.

Shapes: B completions of a forward pass, T tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from asyncdapo.algorithm.dapo import MAX_LOG_RATIO, importance_ratio
from asyncdapo.algorithm.variants import PolicyLoss, ppo_loss

ENTROPY_FLOOR = 0.01
"""ESTR's ε, in nats: where the model is certain, a token may still move a little."""
TINY = 1e-8
"""Added to both probabilities of the other tokens, as in the code of DPPO's authors: they may be 0."""


def m2po_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, *, trusted_BT: Tensor
) -> PolicyLoss:
    """−M_t r_t Â (M2PO). `trusted_BT` is M: (log r_t)² is below the update's limit
    (`corrections.second_moment_limit`)."""
    ratio_BT = importance_ratio(logp_BT, old_logp_BT, mask_BT)
    return PolicyLoss(
        ratio_BT=ratio_BT,
        loss_BT=torch.where(mask_BT & trusted_BT, -advantages_BT * ratio_BT, 0.0),
        untrusted_BT=mask_BT & ~trusted_BT,
        **_unclipped(mask_BT),
    )


def dppo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    divergence: Literal["tv", "kl"],
    clip_low: float,
    clip_high: float,
    dppo_ratio_cap: float = 20.0,
) -> PolicyLoss:
    """−M_t r_t Â (DPPO). Of a token with Â > 0 that has risen M_t = 0 where the divergence is above `clip_high`, of one
    with Â < 0 that has fallen where it is above `clip_low`. A ratio above `dppo_ratio_cap` is truncated, and keeps its
    gradient: a rare token may have any ratio at a divergence of nearly 0."""
    ratio_BT = importance_ratio(logp_BT, old_logp_BT, mask_BT)
    gone_BT = _binary_divergence(logp_BT.detach(), old_logp_BT, divergence)
    high_BT = mask_BT & (advantages_BT > 0) & (logp_BT > old_logp_BT) & (gone_BT > clip_high)
    low_BT = mask_BT & (advantages_BT < 0) & (logp_BT < old_logp_BT) & (gone_BT > clip_low)
    weight_BT = -advantages_BT * ratio_BT.detach().clamp(max=dppo_ratio_cap)
    kept_BT = torch.where(mask_BT & ~high_BT & ~low_BT, weight_BT, 0.0)
    return PolicyLoss(
        ratio_BT=ratio_BT,
        loss_BT=kept_BT * (1 + logp_BT - logp_BT.detach()),  # the value and the gradient of −r Â, up to the cap
        clipped_low_BT=low_BT,
        clipped_high_BT=high_BT,
        clipped_dual_BT=mask_BT & ~high_BT & ~low_BT & (ratio_BT > dppo_ratio_cap),
    )


def _binary_divergence(logp_BT: Tensor, old_logp_BT: Tensor, divergence: Literal["tv", "kl"]) -> Tensor:
    """Of the two-way distributions (this token, any other): their total variation, or KL(π_old ‖ π) in nats."""
    if divergence == "tv":
        return (logp_BT.exp() - old_logp_BT.exp()).abs()
    other_BT, old_other_BT = -logp_BT.expm1() + TINY, -old_logp_BT.expm1() + TINY
    return old_logp_BT.exp() * (old_logp_BT - logp_BT) - old_logp_BT.expm1() * (old_other_BT / other_BT).log()


def estr_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    entropy_BT: Tensor,
    estr_threshold: float,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """M_t times the clipped loss (ESTR), M_t = 1 where (log r_t)² ≤ `estr_threshold` · (H_t + ε): a token may move the
    further, the less certain the model is at its place. H_t in nats; no gradient passes through it."""
    clipped = ppo_loss(
        logp_BT, old_logp_BT, advantages_BT, mask_BT, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    log_ratio_BT, scale_BT = logp_BT.detach() - old_logp_BT, entropy_BT.detach() + ENTROPY_FLOOR
    untrusted_BT = mask_BT & (log_ratio_BT.square() > estr_threshold * scale_BT)
    return PolicyLoss(
        ratio_BT=clipped.ratio_BT,
        loss_BT=torch.where(untrusted_BT, 0.0, clipped.loss_BT),
        clipped_low_BT=clipped.clipped_low_BT & ~untrusted_BT,
        clipped_high_BT=clipped.clipped_high_BT & ~untrusted_BT,
        clipped_dual_BT=clipped.clipped_dual_BT & ~untrusted_BT,
        untrusted_BT=untrusted_BT,
    )


def sapo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    sapo_tau: tuple[float, float] = (1.0, 1.05),
) -> PolicyLoss:
    """−f(r_t) Â (SAPO), with the first τ where Â > 0, else the second. f'(1) = 1: on policy its gradient is that of r.
    The gate is what is left of it, 4 σ (1 − σ), from 1 at r = 1 to 0 far away."""
    ratio_BT = importance_ratio(logp_BT, old_logp_BT, mask_BT)
    tau_BT = _either(advantages_BT > 0, sapo_tau, ratio_BT)
    share_BT = torch.sigmoid(tau_BT * (ratio_BT - 1))
    return PolicyLoss(
        ratio_BT=ratio_BT,
        loss_BT=torch.where(mask_BT, -advantages_BT * share_BT * (4 / tau_BT), 0.0),
        gate_BT=torch.where(mask_BT, (4 * share_BT * (1 - share_BT)).detach(), 0.0),
        **_unclipped(mask_BT),
    )


def vespo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    vespo_k: tuple[float, float] = (2.0, 3.0),
    vespo_lambda: tuple[float, float] = (3.0, 2.0),
) -> PolicyLoss:
    """−φ(W) Â log π_θ at every token of a response (VESPO), with the first k and λ where Â ≥ 0, else the second ones.
    φ(1) = 1, and φ falls to 0 for a response that one of the policies all but rules out. It is the gate, a constant."""
    log_ratio_B1 = torch.where(mask_BT, logp_BT.detach() - old_logp_BT, 0.0).sum(-1, keepdim=True)
    log_ratio_B1 = log_ratio_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    k_BT = _either(advantages_BT >= 0, vespo_k, log_ratio_B1)
    lambda_BT = _either(advantages_BT >= 0, vespo_lambda, log_ratio_B1)
    gate_BT = torch.where(mask_BT, (k_BT * log_ratio_B1 - lambda_BT * log_ratio_B1.expm1()).exp(), 0.0)
    return PolicyLoss(
        ratio_BT=torch.where(mask_BT, log_ratio_B1.exp(), 0.0),
        loss_BT=-torch.where(mask_BT, gate_BT * advantages_BT, 0.0) * logp_BT,
        gate_BT=gate_BT,
        **_unclipped(mask_BT),
    )


def _either(first_BT: Tensor, numbers: tuple[float, float], like: Tensor) -> Tensor:
    """The first number where it is to be that, else the second, in the precision of `like`."""
    one, other = (like.new_full((), number) for number in numbers)
    return torch.where(first_BT, one, other)


def _unclipped(mask_BT: Tensor) -> dict[str, Tensor]:
    """No token, for each of the bounds that a loss doesn't have."""
    none_BT = torch.zeros_like(mask_BT)
    return {"clipped_low_BT": none_BT, "clipped_high_BT": none_BT, "clipped_dual_BT": none_BT}
