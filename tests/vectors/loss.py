"""Checks of what the learner computes: losses and their gradients, averages, advantages, corrections, KL, entropy.

Shapes: N or B completions, T tokens.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asyncdapo.algorithm.advantages import ADVANTAGES
from asyncdapo.algorithm.averages import AGGREGATIONS, aggregation_weights
from asyncdapo.algorithm.corrections import chi2, correction_weights, effective_sample_size, kl_penalty
from asyncdapo.algorithm.dapo import group_advantage, importance_ratio
from asyncdapo.algorithm.policy_loss import policy_loss
from asyncdapo.algorithm.variants import response_ratio
from asyncdapo.learner.model.logprobs import linear_logprobs
from tests.vectors.file import Inputs

VARIANTS = {"ppo": "ppo", "gspo": "gspo", "cispo": "cispo", "decoupled": "ppo"}
"""The vectors' variants, and ours."""
ADVANTAGE_MODES = {"grpo": "grpo", "grpo_no_std": "dr_grpo", "rloo": "rloo"}
"""The vectors' modes, and ours."""


def check_policy_loss(inputs: Inputs) -> dict[str, Any]:
    variant, agg = inputs.one_of("variant", VARIANTS), inputs.one_of("loss_agg", AGGREGATIONS)
    mask_BT = inputs.mask("mask")
    logp_BT = inputs.tensor("logp").requires_grad_()
    decoupled = variant == "decoupled"
    anchor_logp_BT = inputs.tensor("prox_logp" if decoupled else "old_logp")
    dual_clip = inputs.get("dual_clip_c")
    policy = policy_loss(
        VARIANTS[variant],
        logp_BT,
        anchor_logp_BT,
        inputs.tensor("advantages"),
        mask_BT,
        clip_low=inputs["clip_low"],
        clip_high=inputs["clip_high"],
        **({} if variant == "cispo" else {"dual_clip": dual_clip}),
    )
    computed, loss_BT = {}, policy.loss_BT
    if decoupled:
        band = (0.0, inputs.number("is_cap", math.inf))
        behaviour_logp_BT = inputs.tensor("behav_logp")
        weights_BT = correction_weights(anchor_logp_BT, behaviour_logp_BT, mask_BT, level="token", band=band).weights_BT
        computed["is_weight"], loss_BT = weights_BT, weights_BT * loss_BT
    loss = (_weights(inputs, agg, mask_BT.sum(-1))[:, None] * loss_BT).sum()
    loss.backward()
    return computed | {
        "ratio": policy.ratio_BT,
        "token_loss": loss_BT,
        "loss": loss,
        "grad_logp": logp_BT.grad,
        "clip_frac_low": _share(policy.clipped_low_BT, mask_BT),
        "clip_frac_high": _share(policy.clipped_high_BT, mask_BT),
        "clip_frac_dual": _share(policy.clipped_dual_BT, mask_BT),
    }


def check_agg(inputs: Inputs) -> dict[str, Any]:
    mode = inputs.one_of("mode", AGGREGATIONS)
    mask_NT = torch.stack([torch.tensor(mask).bool() for mask in inputs["masks"]]).all(0)
    loss_NT = torch.where(mask_NT, inputs.tensor("loss_mat"), 0.0)
    num_tokens_N = mask_NT.sum(-1)
    weights_N = _weights(inputs, mode, num_tokens_N)

    def part(rows: list[int]) -> float:
        return (weights_N[rows, None] * loss_NT[rows]).sum().item()

    splits = [split["ranks"] for split in inputs.records("splits", "name", "ranks")]
    contributions = [[[part(rows) for rows in micro_batches] for micro_batches in ranks] for ranks in splits]
    return {
        "loss": part(list(range(len(loss_NT)))),
        "denominator": _denominator(mode, weights_N, num_tokens_N, _group_ids(inputs, mode, len(loss_NT))),
        "contributions": contributions,
        "rank_loss_for_mean_reduce": [[len(ranks) * sum(parts) for parts in ranks] for ranks in contributions],
    }


def _weights(inputs: Inputs, agg: str, num_tokens_N: Tensor) -> Tensor:
    """Weight of each completion's tokens in the whole update, where all stand once."""
    needs_length = agg == "seq-mean-token-sum-norm"
    max_response_length = inputs["max_response_length"] if needs_length else inputs.number("max_response_length", 1)
    group_ids_N = _group_ids(inputs, agg, len(num_tokens_N))
    return aggregation_weights(
        agg, num_tokens_N, group_ids_N, torch.ones_like(num_tokens_N), max_response_length=max_response_length
    )


def _group_ids(inputs: Inputs, agg: str, num_rows: int) -> Tensor:
    """Numbers in the place of ids of any kind; rows are groups of their own where it doesn't matter."""
    ids = inputs["group_ids"] if agg == "prompt-mean" else inputs.get("group_ids") or range(num_rows)
    number = {group_id: index for index, group_id in enumerate(dict.fromkeys(ids))}
    return torch.tensor([number[group_id] for group_id in ids], dtype=torch.int64)


def _denominator(mode: str, weights_N: Tensor, num_tokens_N: Tensor, group_ids_N: Tensor) -> int | float:
    """What the sum over completions or prompts is divided by, as the weights have it: the same in all of them."""
    inner_N = torch.ones_like(num_tokens_N)
    if mode == "seq-mean-token-mean":
        inner_N = num_tokens_N.clamp(min=1)
    elif mode == "prompt-mean":
        same_group_NN = group_ids_N[:, None] == group_ids_N
        inner_N = (same_group_NN * num_tokens_N).sum(-1).clamp(min=1)
    outer_N = 1 / (weights_N * inner_N)
    [denominator] = {round(outer) if abs(outer - round(outer)) < 1e-9 else outer for outer in outer_N.tolist()}
    return denominator


def check_advantage(inputs: Inputs) -> dict[str, Any]:
    mode = inputs.one_of("mode", ADVANTAGE_MODES)
    of_group = ADVANTAGES[ADVANTAGE_MODES[mode]]
    eps = inputs["eps"] if mode == "grpo" else inputs.get("eps")
    if mode == "grpo":
        of_group = partial(group_advantage, eps=eps)
    rewards_N, ids = inputs.tensor("rewards"), inputs["group_ids"]
    advantages_N, groups = torch.empty_like(rewards_N), {}
    for group_id in dict.fromkeys(ids):
        members_N = torch.tensor([other == group_id for other in ids])
        rewards_G = rewards_N[members_N]
        advantages_N[members_N] = of_group(rewards_G)
        if rewards_G.min() == rewards_G.max():
            assert not advantages_N[members_N].any(), f"group {group_id} is constant or alone, its advantage is not 0"
        groups[str(group_id)] = _statistics(rewards_G)
    return {"advantages": advantages_N, "groups": groups}


def _statistics(rewards_G: Tensor) -> dict[str, Any]:
    """Mean and standard deviation of a group as the advantages have them: what is subtracted, and what divides."""
    centred_G = ADVANTAGES["dr_grpo"](rewards_G)
    normed_G = group_advantage(rewards_G, eps=0.0)
    std = (centred_G.abs().max() / normed_G.abs().max()).item() if normed_G.any() else 0.0
    return {"mean": (rewards_G - centred_G)[0].item(), "std": std, "n": len(rewards_G)}


def check_kl(inputs: Inputs) -> dict[str, Any]:
    ref_logp_BT, mask_BT = inputs.tensor("ref_logp"), inputs.mask("mask")
    computed = {}
    for estimator in ("k1", "k2", "k3"):
        logp_BT = inputs.tensor("logp").requires_grad_()
        penalty_BT = kl_penalty(logp_BT, ref_logp_BT, mask_BT, estimator)
        penalty_BT.sum().backward()
        computed |= {
            estimator: penalty_BT,
            f"mean_{estimator}": _share(penalty_BT, mask_BT),
            f"grad_{estimator}": logp_BT.grad,
        }
    return computed


def check_tis(inputs: Inputs) -> dict[str, Any]:
    mode = inputs.one_of("mode", ("truncate", "mask"))
    logp_BT, rollout_logp_BT, mask_BT = inputs.tensor("train_logp"), inputs.tensor("rollout_logp"), inputs.mask("mask")
    band = (0.0, inputs.number("cap", math.inf)) if mode == "truncate" else tuple(inputs["band"])
    correction = correction_weights(
        logp_BT,
        rollout_logp_BT,
        mask_BT,
        level=inputs.one_of("level", ("token", "sequence", "geometric")),
        mode=mode,
        band=band,
        outlier_band=inputs.get("outlier_band"),
        outlier_scope=inputs.one_of("outlier_scope", ("token", "sequence"), default="token"),
    )
    weights_BT = correction.weights_BT
    ratio_BT = importance_ratio(logp_BT, rollout_logp_BT, mask_BT)
    ratio_B = response_ratio(logp_BT, rollout_logp_BT, mask_BT, geometric=False)[mask_BT.any(-1)]
    num_left = int(correction.mask_BT.sum())
    return {
        "weights": weights_BT,
        "mask": correction.mask_BT.int(),
        "ess": effective_sample_size(weights_BT.sum().item(), weights_BT.square().sum().item(), num_left),
        "chi2_token": chi2(ratio_BT.square().sum().item(), int(mask_BT.sum())),
        "chi2_seq": chi2(ratio_B.square().sum().item(), len(ratio_B)),
        "frac_truncated": _share(correction.truncated_BT, correction.mask_BT),
        "frac_masked": _share(mask_BT & ~correction.mask_BT, mask_BT),
    }


def check_entropy(inputs: Inputs) -> dict[str, Any]:
    logits_NV = inputs.tensor("logits")
    identity_VV, any_N = torch.eye(logits_NV.shape[-1], dtype=logits_NV.dtype), torch.zeros(len(logits_NV)).long()
    _, entropy_N = linear_logprobs(logits_NV, identity_VV, any_N, temperature=inputs["temperature"])
    mask_N = inputs.mask("mask")
    return {"entropy": entropy_N, "mean_entropy": _share(torch.where(mask_N, entropy_N, 0.0), mask_N)}


def _share(values_BT: Tensor, mask_BT: Tensor) -> float:
    """Mean over the tokens of the mask of what is 0 elsewhere; 0 when there are none."""
    return values_BT.sum().item() / max(1, int(mask_BT.sum()))
