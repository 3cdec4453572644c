"""Functions from verl's values to ours, for the table of rules in verl.py."""

from __future__ import annotations

import re
from math import ceil
from typing import Any

from asyncdapo.convert import data_files
from asyncdapo.convert import meanings as mean
from asyncdapo.convert.gpus import Gpus, number_of
from asyncdapo.convert.rules import Left, Made, Rank, either, flag, number, plain, whole

AGGREGATIONS = {
    name: name for name in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
}
MODEL, ACTOR, ROLLOUT = ("actor_rollout_ref.model.", "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.")
CORRECTION = "algorithm.rollout_correction."
OTHERWISE: tuple[tuple[str, str, Rank, tuple[Any, ...]], ...] = (
    ("data.image_key", "prompts have no images here", Rank.TASK, ()),
    ("data.custom_cls.path", "YOUR DATA SET CLASS IS NOT CARRIED OVER: asyncdapo data prepare", Rank.TASK, ()),
    ("data.train_max_samples", "only that many rows there, all rows here", Rank.TASK, (-1,)),
    (f"{MODEL}custom_chat_template", "the tokenizer's own chat template is used here", Rank.TASK, ()),
    ("distillation.enabled", "no distillation here", Rank.TASK, ()),
    (f"{MODEL}lora_rank", mean.ALL_WEIGHTS, Rank.LOSS, (-1,)),
    (f"{MODEL}lora.rank", mean.ALL_WEIGHTS, Rank.LOSS, (-1,)),
    (f"{MODEL}lora_adapter_path", mean.ALL_WEIGHTS, Rank.LOSS, ()),
    (f"{CORRECTION}rollout_rs", "no such rejection here: loss.outlier_band masks tokens or responses", Rank.LOSS, ()),
    (f"{CORRECTION}rollout_token_veto_threshold", "no such rejection here: loss.outlier_band", Rank.LOSS, ()),
    (f"{CORRECTION}loss_type", "REINFORCE there, PPO's clipped loss here", Rank.LOSS, ("ppo_clip",)),
    (f"{CORRECTION}rollout_is_batch_normalize", "the weights are not normalised to a mean of 1 here", Rank.LOSS, ()),
    (f"{ACTOR}loss_scale_factor", "the norm is rollout.max_response_length here", Rank.LOSS, ()),
    ("algorithm.use_pf_ppo", "no such resampling here", Rank.LOSS, ()),
    (f"{ROLLOUT}repetition_penalty", "training samples from the whole distribution here", Rank.SAMPLING, (1,)),
    (f"{ACTOR}optim.lr_scheduler_type", mean.CONSTANT, Rank.SCHEDULE, ("constant",)),
    (f"{ACTOR}optim.warmup_style", mean.CONSTANT, Rank.SCHEDULE, ("constant",)),
    (f"{ACTOR}optim.optimizer", "AdamW here", Rank.SCHEDULE, ("AdamW",)),
)
"""(key, reason, rank, harmless values): keys that change training unless empty or harmless."""
ADVANTAGES = {"grpo": "grpo", "grpo_vectorized": "grpo", "rloo": "rloo", "rloo_vectorized": "rloo"}
OF_BATCH = {"reinforce_plus_plus": "reinforce_pp", "reinforce_plus_plus_baseline": "reinforce_pp_baseline"}
OF_SEQUENCES = ("gspo", "geo_mean", "sapo")
"""Losses with an average of their own."""
NO_CLIP = "their sapo has no clip"


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
            return mean.share_of_steps()
        steps = int(number(ratio) * whole(total))
    *_, sync, require = step
    per_step = plain(updates_per_step(*step)) or 1 if sync is None else whole(require or 1)
    return mean.warmup(steps, per_step * whole(epochs or 1))


def gen_multiplier(gen: Any, train: Any, filters: Any, sync: Any) -> Any:
    """Our generation batches are multiples of the batch."""
    applies = gen is not None and sync is None and flag(filters)
    return mean.ceil_of(whole(gen) / whole(train)) if applies else None


def microbatch(tokens: Any, dynamic: Any, completions: Any, prompt: Any, response: Any) -> Any:
    """Tokens of a forward pass."""
    if flag(dynamic) or completions is None:
        return whole(tokens) if flag(dynamic) and tokens is not None else None
    return Made(whole(completions) * (whole(prompt) + whole(response)), "completions there, computed tokens here")


def gpus_of(nodes: Any, each: Any, parallel: Any, their_nodes: Any, their_each: Any) -> Gpus | None:
    """GPU counts. In their asynchronous training, engines have GPUs of their own."""
    if nodes is None and each is None:
        return None
    parallel = whole(parallel or 1)
    own = None if their_each is None else max(1, number_of(their_nodes, their_each) // parallel)
    return Gpus(total=number_of(nodes, each), parallel=parallel, together=own is None, engines=own)


# ---------------------------------------------------------------------------------------------------------------- loss


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


# -------------------------------------------------------------------------------------------------------------- reward


def verifier(manager: Any, files: Any, *own: Any) -> Any:
    """Our verifier; theirs is chosen by each row's data_source."""
    if any(own):
        return Made(mean.OWN_FUNCTION, "name your own here")
    name, sure = _verifier_of(files)
    why = f"they choose by each row's data_source; reward.verifier={name} for all rows is a guess: check it"
    return Made(name, "their verdict on this data" if sure else why, loud=None if sure else Rank.TASK)


def _verifier_of(files: Any) -> tuple[str, bool]:
    """The verifier by the data sets' names, and whether it is theirs for all of them: GSM8K's answers follow ####,
    DAPO's follow `Answer:`, others are in a box."""
    made = [_of_name(str(file).lower()) for file in (files if isinstance(files, list) else [files])]
    return made[0][0], all(sure for _, sure in made) and len(set(made)) == 1


def _of_name(name: str) -> tuple[str, bool]:
    if re.search(r"gsm8k", name):
        return "gsm8k", True
    known = re.search(r"dapo|aime", name) is not None
    return ("dapo" if known or not re.search(r"math|deepscale|numina|orz", name) else "math_verify"), known


def incorrect(files: Any, *own: Any) -> Any:
    """Reward of a wrong answer: -1 for DAPO's data, 0 for others."""
    return None if any(own) or _verifier_of(files)[0] == "dapo" else 0.0


def truncation(side: Any, filtered: Any) -> Left:
    """What their data loader does with prompts that are too long."""
    if flag(filtered) or side == "error":
        return Left("longer prompts are always left out and counted here")
    return Left("longer prompts are cut there, left out and counted here", loud=Rank.DETAIL)


def epochs(passes: Any, rollout: Any, files: Any) -> Any:
    """Epochs; older versions of their asynchronous trainer end at the lower of two numbers."""
    both = [count for count in (passes, rollout) if count is not None]
    return data_files.epochs(min(both), files) if both else None


def overlong_penalty(factor: Any, enable: Any, length: Any) -> Any:
    if factor is None:
        return None
    return number(factor) if flag(enable) and length else Left("overlong_buffer.enable is false")


def steps_of_prompts(samples: Any, *step: Any) -> Any:
    prompts = None if samples is None else _number_of_prompts(step)
    return Made(max(1, whole(samples) // prompts), "prompts there, train steps here") if prompts else None


def eval_temperature(temperature: Any, sample: Any) -> Any:
    return Made(0.0, "greedy without do_sample") if _is_greedy(sample) else number(temperature)


def eval_samples(count: Any, sample: Any, temperature: Any, files: Any) -> Any:
    if not plain(eval_temperature(temperature, sample)):
        return 1 if count == 1 else Left("their evaluation is greedy, so all would be the same")
    return data_files.samples(count, files)


def eval_sampling(value: Any, sample: Any) -> Any:
    return Left("greedy without do_sample") if _is_greedy(sample) else value


def _is_greedy(sample: Any) -> bool:
    return sample is not None and not flag(sample)


def when_filtering(value: Any, enable: Any) -> Any:
    return value if flag(enable) else Left("filter_groups.enable is false")


def staleness(threshold: Any, partial: Any) -> Any:
    return None if threshold is None else ceil(number(threshold)) + flag(partial)
