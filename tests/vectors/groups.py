"""Checks of what happens to a group before it is trained on: rewards, masks, the filter; and of evaluation."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from asyncdapo.algorithm.dapo import soft_overlong_punishment
from asyncdapo.controller.eval.sampled import avg_at_k, maj_at_k, pass_at_k
from asyncdapo.errors import ConfigError
from asyncdapo.messages import NO_CHECKSUM, Completion, Context, Group
from asyncdapo.replay.config import FilterConfig
from asyncdapo.replay.core.filter import MIN_SPREAD, judge
from asyncdapo.replay.server.arrivals import arrival
from asyncdapo.reward.scorer import scale
from asyncdapo.reward.verifiers import dapo as verifier
from asyncdapo.rollout.groups import loss_mask
from tests.vectors.file import Inputs, MisunderstoodError


def check_overlong(inputs: Inputs) -> dict[str, Any]:
    rules = {"soft_punishment": _soft_punishment, "filtering": _overlong_filtering}
    return rules[inputs.one_of("rule", rules)](inputs)


def _soft_punishment(inputs: Inputs) -> dict[str, Any]:
    penalties_N = soft_overlong_punishment(
        torch.tensor(inputs["lengths"]),
        max_length=inputs["max_len"],
        buffer=inputs["cache_len"],
        penalty=inputs["penalty_factor"],
    )
    rewards = inputs.get("rewards")
    shaped = {} if rewards is None else {"shaped_rewards": inputs.tensor("rewards") + penalties_N}
    return {"penalties": penalties_N} | shaped


def _overlong_filtering(inputs: Inputs) -> dict[str, Any]:
    """Positions of a row are its tokens; what was masked before stays masked."""
    mask_NT = inputs.mask("mask")
    reasons = inputs["finish_reasons"]
    if unknown := set(reasons) - {"stop", "length"}:
        raise MisunderstoodError(f"unknown finish reasons: {', '.join(sorted(unknown))}")
    filtered_NT = torch.stack([_expand(loss_mask(mask_NT.shape[1], reason, True)) for reason in reasons])
    left_NT = mask_NT & filtered_NT
    return {
        "mask": left_NT.int(),
        "n_tokens": int(left_NT.sum()),
        "n_truncated": int((~filtered_NT.any(-1)).sum()),
    }


def _expand(runs: list[tuple[int, int]]) -> Tensor:
    return torch.tensor([bool(value) for value, count in runs for _ in range(count)])


def check_reward_scaling(inputs: Inputs) -> dict[str, Any]:
    correct, incorrect = inputs["correct"], inputs["incorrect"]
    return {"rewards": [scale(source, correct=correct, incorrect=incorrect) for source in inputs["source"]]}


def check_filter(inputs: Inputs) -> dict[str, Any]:
    """Each group as it arrives at the replay server, in order of first appearance. A field that is no number (an id, a
    text) is no metric."""
    if inputs["threshold"] != MIN_SPREAD:
        raise MisunderstoodError(f"threshold is {inputs['threshold']}, the filter's is {MIN_SPREAD}")
    config = FilterConfig(metric=inputs["metric"])
    samples: dict[str, list[dict[str, float]]] = {}
    for sample in inputs["samples"]:
        metrics = {
            name: float(value) for name, value in sample.items() if name != "group" and isinstance(value, int | float)
        }
        samples.setdefault(sample["group"], []).append(metrics)
    verdicts = {}
    for name, metrics in samples.items():
        done = arrival(_group(metrics))
        try:
            verdicts[name] = judge(config, done.metrics, done.num_loss_tokens)
        except ConfigError as error:
            if error.key != "filter.metric":
                raise
            return {"error": "missing_metric", "group": name}
    return {
        "kept": [name for name, verdict in verdicts.items() if verdict == "kept"],
        "dropped": [name for name, verdict in verdicts.items() if verdict == "constant"],
    }


def _group(metrics: list[dict[str, float]]) -> Group:
    """A group whose completions have these metrics and one token each."""
    completions = [
        Completion(
            contexts=[Context.of_turn([(0, 1)], [(1, 1)], NO_CHECKSUM)],
            finish_reason="stop",
            reward=0.0,
            metrics=numbers,
        )
        for numbers in metrics
    ]
    return Group(
        prompt_id=0,
        lease_id=0,
        branch=0,
        attempt=1,
        worker=0,
        num_prompt_tokens=1,
        completions=completions,
        generate_s=0.0,
    )


def check_eval(inputs: Inputs) -> dict[str, Any]:
    metric, k = inputs.one_of("metric", ("avg@k", "pass@k", "maj@k")), inputs["k"]
    if metric == "avg@k":  # of all samples that a problem has, however many
        per_problem = [mean for verdicts in inputs["correct"] for mean in avg_at_k([verdicts], len(verdicts))]
    elif metric == "pass@k":
        per_problem = pass_at_k(inputs["n"], inputs["c"], k)
    else:
        per_problem = maj_at_k(inputs["preds"], inputs["correct"], k)
    return {"per_problem": per_problem, "value": fmean(per_problem)}


def check_verifier(inputs: Inputs) -> dict[str, Any]:
    text, answer = inputs["solution"], inputs["ground_truth"]
    acc = verifier.verify(text, answer)["acc"]
    score = scale(acc, correct=1.0, incorrect=-1.0)
    return {"pred": verifier.extract(text), "acc": acc == 1.0, "score": score}
