"""Functions from verl's values to ours, for the table of rules in verl.py."""

from __future__ import annotations

import re
from math import ceil
from typing import Any

from asyncdapo.convert import data_files
from asyncdapo.convert import meanings as mean
from asyncdapo.convert.gpus import Gpus, number_of
from asyncdapo.convert.rules import Left, Made, Rank, flag, number, plain, whole

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
