"""Checks of the losses and advantages that have a group of their own: named as the value of the key that chooses them.

Shapes: N completions, B of them, T tokens, n loss-bearing tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asyncdapo.algorithm.advantages import BATCH_ADVANTAGES, batch_advantages
from asyncdapo.algorithm.averages import AGGREGATIONS, aggregation_weights
from asyncdapo.algorithm.corrections import correction_weights, loglinear_logprobs, second_moment_limit
from asyncdapo.algorithm.policy_loss import policy_loss
from tests.vectors.file import Inputs

OWN_KEYS = {
    "gmpo": ("clip_low", "clip_high"),
    "m2po": (),
    "dppo_tv": ("clip_low", "clip_high", "dppo_ratio_cap"),
    "dppo_kl": ("clip_low", "clip_high", "dppo_ratio_cap"),
    "estr": ("estr_threshold", "clip_low", "clip_high"),
    "sapo": ("sapo_tau",),
    "vespo": ("vespo_k", "vespo_lambda"),
}
"""Numbers that a loss is called with; what is left out or null is as published."""


def check_variant(variant: str, inputs: Inputs) -> dict[str, Any]:
    given = {key: inputs.get(key) for key in OWN_KEYS[variant]}
    numbers = {key: value for key, value in given.items() if value is not None}
    if variant == "estr":
        numbers |= {"dual_clip": inputs.get("dual_clip_c"), "entropy_BT": inputs.tensor("entropy")}
    if variant == "m2po":
        numbers["trusted_BT"] = _trusted(inputs)
    logp_BT, mask_BT = inputs.tensor("logp").requires_grad_(), inputs.mask("mask")
    policy = policy_loss(variant, logp_BT, inputs.tensor("old_logp"), inputs.tensor("advantages"), mask_BT, **numbers)
    left_BT = mask_BT if policy.untrusted_BT is None else mask_BT & ~policy.untrusted_BT
    if variant.startswith("dppo"):
        left_BT = left_BT & ~policy.clipped_low_BT & ~policy.clipped_high_BT
    return {"mask": left_BT.int(), "ratio": policy.ratio_BT, **_averaged(inputs, policy.loss_BT, logp_BT, mask_BT)}


def _trusted(inputs: Inputs) -> Tensor:
    """The vector is a whole update."""
    squares_BT = (inputs.tensor("start_logp") - inputs.tensor("old_logp")).square()
    squares_n, threshold = squares_BT[inputs.mask("mask")], inputs.number("m2po_threshold", 0.04)
    return squares_BT < second_moment_limit(squares_n, torch.ones_like(squares_n), threshold)


def check_loglinear(inputs: Inputs) -> dict[str, Any]:
    mask_BT = inputs.mask("mask")
    logp_BT, old_logp_BT = inputs.tensor("logp").requires_grad_(), inputs.tensor("old_logp")
    prox_logp_BT = loglinear_logprobs(logp_BT, old_logp_BT, inputs.tensor("staleness"))
    clips = {"clip_low": inputs["clip_low"], "clip_high": inputs["clip_high"], "dual_clip": inputs.get("dual_clip_c")}
    policy = policy_loss("ppo", logp_BT, prox_logp_BT, inputs.tensor("advantages"), mask_BT, **clips)
    band = (0.0, inputs.number("is_cap", math.inf))
    weights_BT = correction_weights(prox_logp_BT, old_logp_BT, mask_BT, level="token", band=band).weights_BT
    averaged = _averaged(inputs, weights_BT * policy.loss_BT, logp_BT, mask_BT)
    return {"mask": mask_BT.int(), "is_weight": weights_BT, **averaged}


def _averaged(inputs: Inputs, loss_BT: Tensor, logp_BT: Tensor, mask_BT: Tensor) -> dict[str, Any]:
    agg = inputs.one_of("loss_agg", AGGREGATIONS, default="token-mean")
    ids = torch.arange(len(mask_BT))
    length = mask_BT.shape[1]
    weights_B = aggregation_weights(agg, mask_BT.sum(-1), ids, torch.ones_like(ids), max_response_length=length)
    loss = (weights_B[:, None] * loss_BT).sum()
    loss.backward()
    return {"token_loss": loss_BT, "loss": loss, "grad": logp_BT.grad}


def check_advantages(name: str, inputs: Inputs) -> dict[str, Any]:
    rewards_N, ids = inputs.tensor("rewards"), inputs["group_ids"]
    members = {one: [index for index, other in enumerate(ids) if other == one] for one in ids}
    of_groups = batch_advantages(name)([rewards_N[places] for places in members.values()], [1] * len(members))
    advantages_N = torch.empty_like(rewards_N)
    for places, advantages_G in zip(members.values(), of_groups, strict=True):
        advantages_N[places] = advantages_G
    return {"advantages": advantages_N}


Check = Callable[[Inputs], dict[str, Any]]
LOSS_CHECKS: dict[str, Check] = {
    **{variant: partial(check_variant, variant) for variant in OWN_KEYS},
    "loglinear": check_loglinear,
}
ADVANTAGE_CHECKS: dict[str, Check] = {name: partial(check_advantages, name) for name in ("maxrl", *BATCH_ADVANTAGES)}
