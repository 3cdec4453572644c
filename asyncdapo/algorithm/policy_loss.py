"""The loss of each token by its name: `loss.variant`. Pure torch, no state, no I/O.

    policy = policy_loss("ppo", logp_BT, old_logp_BT, advantages_BT, mask_BT, clip_low=0.2, clip_high=0.28)

In: log-probs of the policy and of the one that the ratio is taken against, advantages that broadcast with them, the
mask, and the variant's own numbers; those left out are as published. Out: a `PolicyLoss`. Does not own: the formulas.

Shapes: B completions of a forward pass, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asyncdapo.algorithm.dapo import importance_ratio
from asyncdapo.algorithm.trust_regions import dppo_loss, estr_loss, m2po_loss, sapo_loss, vespo_loss
from asyncdapo.algorithm.variants import PolicyLoss, cispo_loss, gmpo_loss, gspo_loss, ppo_loss
from asyncdapo.plugins import cached_plugin, is_plugin

VARIANTS: dict[str, Callable[..., PolicyLoss]] = {
    "ppo": ppo_loss,
    "gspo": gspo_loss,
    "gmpo": gmpo_loss,
    "cispo": cispo_loss,
    "m2po": m2po_loss,
    "dppo_tv": partial(dppo_loss, divergence="tv"),
    "dppo_kl": partial(dppo_loss, divergence="kl"),
    "estr": estr_loss,
    "sapo": sapo_loss,
    "vespo": vespo_loss,
}


def policy_loss(
    variant: str,
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    **numbers: Any,
) -> PolicyLoss:
    """Loss of each token, [B, T]; 0 outside the mask."""
    if not is_plugin(variant):
        return VARIANTS[variant](logp_BT, old_logp_BT, advantages_BT, mask_BT, **numbers)
    returned = cached_plugin("loss.variant", variant)(logp_BT, old_logp_BT, advantages_BT, mask_BT, **numbers)
    return returned if isinstance(returned, PolicyLoss) else _unclipped(returned, logp_BT, old_logp_BT, mask_BT)


def _unclipped(loss_BT: Tensor, logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor) -> PolicyLoss:
    """Of a function of the user's that doesn't say what it clips: each token's ratio is measured, no clipped token."""
    none_BT = torch.zeros_like(mask_BT)
    return PolicyLoss(
        ratio_BT=importance_ratio(logp_BT.detach(), old_logp_BT, mask_BT),
        loss_BT=torch.where(mask_BT, loss_BT, 0.0),
        clipped_low_BT=none_BT,
        clipped_high_BT=none_BT,
        clipped_dual_BT=none_BT,
    )
