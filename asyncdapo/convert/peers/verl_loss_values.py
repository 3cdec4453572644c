"""Functions from verl's values of the loss to ours, for the table of rules in verl.py."""

from __future__ import annotations

from typing import Any

from asyncdapo.convert import meanings as mean
from asyncdapo.convert.rules import Left, Made, either, flag, number

AGGREGATIONS = {
    name: name for name in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
}
ADVANTAGES = {"grpo": "grpo", "grpo_vectorized": "grpo", "rloo": "rloo", "rloo_vectorized": "rloo"}
OF_BATCH = {"reinforce_plus_plus": "reinforce_pp", "reinforce_plus_plus_baseline": "reinforce_pp_baseline"}
OF_SEQUENCES = ("gspo", "geo_mean", "sapo")
"""Losses with an average of their own."""
NO_CLIP = "their sapo has no clip"


def aggregation(mode: Any, variant: Any) -> Any:
    if variant in OF_SEQUENCES:
        return Made("seq-mean-token-mean", f"its {variant} has no other")
    if mode == "seq-mean-token-sum-norm":
        return Made(mode, "theirs lacks the mean over sequences: the same up to the number of completions, a constant")
    return None if mode is None else either(mode, AGGREGATIONS, "no such aggregation here")


def old_aggregation(token_level: Any) -> str:
    return "token-mean" if flag(token_level) else "seq-mean-token-mean"


def clip_low(bound: Any, variant: Any) -> Any:
    """The lower bound of the ratio. In their CISPO a value above 1 turns it off."""
    if variant == "cispo" and bound is not None and bound > 1:
        return Made(1.0, "no lower bound")
    return clip_high(bound, variant)


def clip_high(bound: Any, variant: Any) -> Any:
    if variant == "sapo":
        return Left(NO_CLIP)
    return None if bound is None else number(bound)


def dual_clip(bound: Any, variant: Any) -> Any:
    if variant in (None, "vanilla"):
        return mean.dual_clip(bound)
    return Made(None, f"their {variant} has no such bound")


def ratio_cap(cap: Any, variant: Any) -> Any:
    return number(cap) if cap is not None and variant in ("dppo_tv", "dppo_kl") else None


def advantage(name: Any, by_std: Any) -> Any:
    if name in ("grpo", "grpo_vectorized") and by_std is not None and not flag(by_std):
        return "dr_grpo"
    if name in OF_BATCH:
        return Made(OF_BATCH[name], "mean and standard deviation over tokens there, over completions here")
    return None if name is None else mean.advantage_of(name, ADVANTAGES)


def anchor(rollout_is: Any, bypass: Any, use_rollout: Any, proximal: Any, cap: Any, sync: Any) -> Any:
    """Our anchor, if their keys set it; if not, see `SYNCHRONOUS`. Their fully asynchronous trainer uses the log-probs
    of the policy that sampled by default."""
    if flag(proximal) or (rollout_is and not flag(bypass)) or (cap is not None and cap > 0):
        return "proximal"
    return "behavior" if flag(bypass) or flag(use_rollout) or sync is not None else None


def run_ahead(threshold: Any, sync: Any, rollout_gpus: Any) -> Any:
    """With GPUs for the engines but no asynchronous trainer, sampling runs one step ahead."""
    if threshold is not None:
        return number(threshold)
    return Made(1.0, "one step off-policy there") if rollout_gpus is not None and sync is None else None


def correction(rollout_is: Any, bypass: Any, cap: Any) -> Any:
    if cap is not None and cap > 0:
        return "token"
    if rollout_is is None or flag(bypass):
        return Left("the ratio already includes the correction") if rollout_is else None
    return either(rollout_is, {"token": "token", "sequence": "sequence"}, "no such weight here")


def correction_mode(threshold: Any, rollout_is: Any, bypass: Any) -> Any:
    """A threshold of two bounds masks; a single one truncates."""
    return "mask" if isinstance(threshold, str) and rollout_is and not flag(bypass) else None


def band(threshold: Any, rollout_is: Any, bypass: Any, cap: Any) -> Any:
    if cap is not None and cap > 0:
        return [0.0, number(cap)]
    if not rollout_is or flag(bypass):
        return Left("has no effect without rollout_is") if threshold is not None else None
    if isinstance(threshold, str):
        return [float(bound) for bound in threshold.split("_")]
    return None if threshold is None else [0.0, number(threshold)]
