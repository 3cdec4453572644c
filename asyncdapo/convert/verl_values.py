"""Functions from verl's values to ours, for the table of rules in verl.py."""

from __future__ import annotations

from math import ceil
from typing import Any

from asyncdapo.convert import meanings as mean
from asyncdapo.convert.gpus import Gpus, number_of
from asyncdapo.convert.rules import Left, Made, either, flag, number, plain, whole

AGGREGATIONS = {
    name: name for name in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
}
ADVANTAGES = {"grpo": "grpo", "grpo_vectorized": "grpo", "rloo": "rloo", "rloo_vectorized": "rloo"}


# ------------------------------------------------------------------------------------------------------------- batches


def prompts_per_step(train: Any, gen: Any, filters: Any, mini: Any, sync: Any, require: Any) -> Any:
    """Prompts between two versions of the weights."""
    if sync is not None:
        return Made(whole(sync) * whole(require or 1) * whole(mini), "mini-batches between two weight updates")
    if gen is not None and not flag(filters):
        return Made(whole(gen), "without the filter the whole generation batch is trained on")
    return None if train is None else whole(train)


def updates_per_step(*step: Any) -> Any:
    """Mini-batches of a train step."""
    return mean.updates(_number_of_prompts(step), step[3])


def _number_of_prompts(step: tuple[Any, ...]) -> Any:
    return plain(prompts_per_step(*step))


def warmup(steps: Any, ratio: Any, total: Any, epochs: Any, *step: Any) -> Any:
    """Their scheduler steps once a train step, which in asynchronous training is `require_batches` mini-batches."""
    if steps is None or whole(steps) < 0:
        if not ratio:
            return None
        if total is None:
            return Left("a share of the steps, whose number isn't known: set learner.warmup_steps")
        steps = int(number(ratio) * whole(total))
    *_, sync, require = step
    per_step = plain(updates_per_step(*step)) or 1 if sync is None else whole(require or 1)
    return mean.warmup(steps, per_step * whole(epochs or 1))


def gen_multiplier(gen: Any, train: Any, filters: Any, sync: Any) -> Any:
    """Generation batches are multiples of the batch here."""
    if gen is None or sync is not None or not flag(filters):
        return None
    return mean.ceil_of(whole(gen) / whole(train), "a whole multiple")


def microbatch(tokens: Any, dynamic: Any, completions: Any, prompt: Any, response: Any) -> Any:
    """Tokens of a forward pass."""
    if flag(dynamic):
        return None if tokens is None else whole(tokens)
    if completions is None:
        return None
    return Made(whole(completions) * (whole(prompt) + whole(response)), "completions there, computed tokens here")


def groups_per_update(*step: Any) -> int:
    return max(1, whole(_number_of_prompts(step) or 1) // (plain(updates_per_step(*step)) or 1))


def gpus_of(nodes: Any, each: Any, parallel: Any, their_nodes: Any, their_each: Any, *step: Any) -> Gpus | None:
    """Engines have GPUs of their own in their asynchronous training."""
    if nodes is None and each is None:
        return None
    parallel = whole(parallel or 1)
    own = None if their_each is None else max(1, number_of(their_nodes, their_each) // parallel)
    total, groups = number_of(nodes, each), groups_per_update(*step)
    return Gpus(total=total, parallel=parallel, groups=groups, together=own is None, engines=own)


# ---------------------------------------------------------------------------------------------------------------- loss


def aggregation(mode: Any, variant: Any) -> Any:
    if variant == "gspo":
        return Made("seq-mean-token-mean", "its gspo has no other")
    if mode == "seq-mean-token-sum-norm":
        return Made(mode, "theirs lacks the mean over sequences: the same up to the number of completions, a constant")
    return None if mode is None else either(mode, AGGREGATIONS, "no such aggregation here")


def old_aggregation(token_level: Any) -> str:
    return "token-mean" if flag(token_level) else "seq-mean-token-mean"


def dual_clip(bound: Any, variant: Any) -> Any:
    if variant in ("gspo", "cispo"):
        return Left(f"their {variant} has none")
    return None if bound is None else number(bound)


def advantage(name: Any, by_std: Any) -> Any:
    if name in ("grpo", "grpo_vectorized") and by_std is not None and not flag(by_std):
        return "dr_grpo"
    return None if name is None else mean.advantage_of(name, ADVANTAGES)


def anchor(rollout_is: Any, bypass: Any, use_rollout: Any, proximal: Any, cap: Any) -> Any:
    """Only where their keys speak of it: without them see `SYNCHRONOUS`."""
    if flag(proximal) or (rollout_is and not flag(bypass)) or (cap is not None and cap > 0):
        return "proximal"
    return "behavior" if flag(bypass) or flag(use_rollout) else None


def correction(rollout_is: Any, bypass: Any, cap: Any) -> Any:
    if cap is not None and cap > 0:
        return "token"
    if rollout_is is None or flag(bypass):
        return Left("the ratio holds the correction already") if rollout_is else None
    return either(rollout_is, {"token": "token", "sequence": "sequence"}, "no such weight here")


def band(threshold: Any, rollout_is: Any, bypass: Any, cap: Any) -> Any:
    if cap is not None and cap > 0:
        return [0.0, number(cap)]
    if not rollout_is or flag(bypass):
        return Left("without rollout_is it does nothing") if threshold is not None else None
    return None if threshold is None else [0.0, number(threshold)]


# -------------------------------------------------------------------------------------------------------------- reward


def verifier(manager: Any, files: Any, *own: Any) -> Any:
    """Theirs goes by each row's data_source."""
    if any(own):
        return Made(mean.OWN_FUNCTION, "name your own here")
    name = mean.verifier_of(str(files))
    return Made(name, "they choose by each row's data_source: change it for other data")


def incorrect(files: Any) -> Any:
    return 0.0 if mean.verifier_of(str(files)) == "gsm8k" else None


def overlong_penalty(factor: Any, enable: Any, length: Any) -> Any:
    if not flag(enable) or not length:
        return Left("overlong_buffer.enable is false") if factor is not None else None
    return None if factor is None else number(factor)


def steps_of_prompts(samples: Any, *step: Any) -> Any:
    prompts = None if samples is None else _number_of_prompts(step)
    if not prompts:
        return None
    return Made(max(1, whole(samples) // prompts), "prompts there, train steps here")


def eval_temperature(temperature: Any, sample: Any) -> Any:
    if sample is not None and not flag(sample):
        return Made(0.0, "greedy without do_sample")
    return None if temperature is None else number(temperature)


def eval_samples(count: Any, sample: Any, files: Any) -> Any:
    if sample is not None and not flag(sample):
        return 1 if count == 1 else Left("greedy without do_sample, so all would be the same")
    return mean.samples(count, files)


def eval_sampling(value: Any, sample: Any) -> Any:
    if sample is not None and not flag(sample):
        return Left("greedy without do_sample")
    return value


def when_filtering(value: Any, enable: Any) -> Any:
    if not flag(enable):
        return Left("filter_groups.enable is false")
    return value


def staleness(threshold: Any, partial: Any) -> Any:
    return None if threshold is None else ceil(number(threshold)) + flag(partial)
