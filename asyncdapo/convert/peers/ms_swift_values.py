"""Functions from ms-swift's values to ours, for the table of rules in ms_swift.py."""

from __future__ import annotations

import re
from dataclasses import replace
from math import ceil
from typing import Any

from asyncdapo.convert import data_files
from asyncdapo.convert import meanings as mean
from asyncdapo.convert.gpus import Gpus, number_of
from asyncdapo.convert.rules import Left, Made, Rank, either, flag, number, plain, whole

LOSSES = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "sapo": "seq-mean-token-mean",
}
LEVELS = {"token": "ppo", "sequence": "gspo"}
VERIFIED = {"accuracy": "math_verify"}
NO_SUCH_LOSS = "no such part of the loss here"
OTHERWISE: tuple[tuple[str, str, Rank, tuple[Any, ...]], ...] = (
    ("stop_words", "a response ends with the tokenizer's own end-of-sequence token here", Rank.TASK, ()),
    ("adapters", "A LoRA is not loaded here: merge it into the model first", Rank.TASK, ()),
    ("teacher_model", "no distillation here", Rank.TASK, ()),
    ("teacher_model_server", "no distillation here", Rank.TASK, ()),
    ("chord_sft_dataset", f"{NO_SUCH_LOSS}: CHORD's supervised loss on answers of a data set", Rank.LOSS, ()),
    ("sdar_loss_coef", NO_SUCH_LOSS, Rank.LOSS, ()),
    ("advantage_reweight", NO_SUCH_LOSS, Rank.LOSS, ()),
    ("off_policy_sequence_mask_delta", "no such mask here: loss.outlier_band", Rank.LOSS, ()),
    ("top_entropy_quantile", "all tokens are trained on here", Rank.LOSS, (1,)),
    ("sync_ref_model", "the reference model never changes here", Rank.LOSS, ()),
    ("repetition_penalty", "training samples from the whole distribution here", Rank.SAMPLING, (1,)),
    ("lr_scheduler_type", mean.CONSTANT, Rank.SCHEDULE, ("constant", "constant_with_warmup")),
)
"""(key, reason, rank, harmless values): keys that change training unless empty or harmless."""
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


# ------------------------------------------------------------------------------------------------ batches and the clock


def _sizes(
    generation: Any, per_device: Any, accumulation: Any, steps: Any, processes: Any, nodes: Any, world: Any, group: Any
) -> tuple[int, int]:
    """Completions of a generation batch and of an optimizer update."""
    if world is not None:  # the Megatron trainer
        return whole(generation if generation is not None else world * (steps or 1)), whole(world)
    forward = whole(per_device or 1) * whole(processes or 1) * whole(nodes or 1)
    accumulated = whole(accumulation) if accumulation is not None else max(1, ceil(16 / forward))
    batch = whole(generation) if generation is not None else forward * whole(steps or accumulated)
    return batch, forward * accumulated


def prompts_per_step(*sizes: Any) -> Any:
    made = _sizes(*sizes)
    if made[0] % whole(sizes[-1]):
        raise ValueError(f"{made[0]} completions are not whole groups of {sizes[-1]}")
    return Made(made[0] // whole(sizes[-1]), f"{made[0]} completions a generation batch there, prompts here")


def updates_per_step(*sizes: Any) -> Any:
    batch, update = _sizes(*sizes)
    return mean.even(max(1, batch // whole(sizes[-1])), batch / update)


def _updates_of_step(*clock: Any) -> int:
    return (plain(updates_per_step(*clock[:-1])) or 1) * whole(clock[-1] or 1)


def in_steps(updates: Any, *clock: Any) -> Any:
    """Train steps; their steps are optimizer updates."""
    if updates is None or number(updates) <= 0:
        return None
    if updates < 1:
        return Left("a share of the steps, whose number isn't known")
    per_step = _updates_of_step(*clock)
    why = f"{updates} optimizer updates there, {per_step} of which are a train step" if per_step > 1 else ""
    return Made(max(1, whole(updates) // per_step), why)


def steps_of_rows(files: Any, passes: Any, *sizes: Any) -> Any:
    """Train steps of a run that ends with its rows, if their number is given."""
    found = [_syntax(file)[2] for file in (files if isinstance(files, list) else [files]) if isinstance(file, str)]
    rows = [num_rows for num_rows in found if num_rows is not None]
    if not rows or len(rows) < len(found) or passes is None:
        return None
    prompts = plain(prompts_per_step(*sizes))
    return Made(max(1, ceil(sum(rows) * number(passes) / prompts)), f"{sum(rows)} rows by {prompts}, {passes:g} times")


def epochs(passes: Any, steps: Any, files: Any) -> Any:
    """Epochs; their number of steps takes precedence."""
    if steps is not None and number(steps) > 0:
        return Left("max_steps counts")
    return data_files.epochs(passes if passes is None else ceil(passes), files)


# ---------------------------------------------------------------------------------------------------------------- data


def _syntax(name: str) -> tuple[str, str, int | None]:
    """Parse `hf::id:subset#rows`: id or file, subset, number of rows drawn."""
    name = re.sub(r"^(hf|ms)::", "", name, flags=re.IGNORECASE)
    name, _, rows = name.rpartition("#") if re.search(r"#\d+$", name) else (name, "", "")
    name, _, subset = name.partition(":")
    return name, subset, int(rows) if rows else None


def _names(files: Any) -> list[str]:
    return [_syntax(str(file))[0] for file in (files if isinstance(files, list) else [files])]


def train_data(files: Any) -> Any:
    """The data, without their notation of subset and rows."""
    made = data_files.train_data(_names(files))
    subsets = [_syntax(str(file))[1] for file in (files if isinstance(files, list) else [files])]
    commands = [
        f"{command} --subset {subset}" if subset else command
        for command, subset in zip(made.before, subsets, strict=True)
    ]
    note = f"{made.note} An id is looked up at ModelScope there, on the Hugging Face hub here.".strip()
    return replace(made, before=tuple(commands), note=note)


def sampled(files: Any) -> Any:
    """A limit on the rows of a data set has no counterpart."""
    rows = [_syntax(str(file))[2] for file in (files if isinstance(files, list) else [files])]
    if not any(rows):
        return None
    return Left("only that many rows there; here prompts are drawn from all rows", loud=Rank.TASK)


def eval_data(files: Any) -> Any:
    return data_files.held_out(_names(files)) if files else None


def eval_rows(files: Any, share: Any) -> Any:
    """Evaluation rows. Without held-out data there is no evaluation: all rows are trained on."""
    if files:
        rows = _syntax(str(files[0] if isinstance(files, list) else files))[2]
        return rows or data_files.all_rows(_names(files))
    return None if share else Made(0, "no data are held out there")


def prompt_length(context: Any, response: Any) -> Any:
    """The part of the context that a response of full length leaves."""
    if context is None or whole(context) <= whole(response):
        return None
    return Made(whole(context) - whole(response), "what vllm_max_model_len leaves; longer prompts are cut there")


def tuner(name: Any, *megatron: Any) -> Any:
    """Their tuner is LoRA by default, except in the Megatron trainer."""
    if name == "full" or (name is None and any(megatron)):
        return Left("as it is here")
    return Left(mean.ALL_WEIGHTS if name else f"{mean.ALL_WEIGHTS} (their default is LoRA)", loud=Rank.LOSS)


def any_prompt_length() -> Made:
    """Their prompt length is limited only by the model."""
    why = "theirs is the model's limit and cuts longer prompts; here longer ones are left out"
    return Made(1024, why, loud=Rank.SAMPLING)


def warmup(updates: Any, steps: Any, files: Any, passes: Any, *clock: Any) -> Any:
    """Warm-up updates; a value below 1 is a share of all updates."""
    if not updates:
        return None
    if number(updates) >= 1:
        return whole(updates)
    if steps is None or whole(steps) <= 0:
        of_rows = plain(steps_of_rows(files, passes, *clock[:-1]))
        if of_rows is None:
            return mean.share_of_steps()
        steps = of_rows * _updates_of_step(*clock)
    return Made(int(number(updates) * whole(steps)), f"of {steps} optimizer updates")


def microbatch(per_device: Any, response: Any, prompt: Any) -> Any:
    if per_device is None or prompt is None:
        return None
    return Made(whole(per_device) * (whole(response) + whole(prompt)), "completions there, computed tokens here")


def gpus_of(processes: Any, nodes: Any, parallel: Any, mode: Any) -> Gpus | None:
    if processes is None:
        return None
    own = Left("the rollout server is started separately there: set rollout.num_workers") if mode == "server" else None
    total = number_of(nodes, processes)
    return Gpus(total=total, parallel=whole(parallel or 1), together=own is None, engines=own)


# ---------------------------------------------------------------------------------------------------------------- loss


def variant(loss: Any, level: Any) -> Any:
    if loss in ("cispo", "sapo"):
        return loss
    if loss not in (None, *LOSSES):
        return mean.known_loss(loss, {})
    return None if level is None else mean.known_loss(level, LEVELS)


def aggregation(loss: Any) -> Any:
    why = {"bnpo": "over all processes here, like their dapo", "dr_grpo": ""}.get(str(loss), "")
    made = either(loss, LOSSES, "its own")
    return made if isinstance(made, Left) else Made(made, why)


def clip_low(epsilon: Any, loss: Any) -> Any:
    if loss == "sapo":
        return Left("their sapo has no clip")
    return Made(1.0, "their cispo has no lower bound") if loss == "cispo" else number(epsilon)


def clip_high(high: Any, epsilon: Any, loss: Any) -> Any:
    if loss == "sapo":
        return Left("their sapo has no clip")
    bound = number(epsilon if high is None else high)
    return Made(bound - 1, "the bound itself there, its distance from 1 here") if loss == "cispo" else bound


def dual_clip(delta: Any, loss: Any) -> Any:
    if delta is None:
        return mean.dual_clip(None)
    return (
        Left(f"their {loss} has no such bound")
        if loss in ("cispo", "sapo")
        else Made(number(delta), "their bound on the ratio has the same effect")
    )


def advantage(estimator: Any, scale: Any) -> Any:
    if estimator not in (None, "grpo", "rloo"):
        return mean.advantage_of(estimator, {})
    if estimator == "rloo":
        return "rloo"
    if scale == "batch":
        return "grpo_batch_std"
    if scale == "gdpo":
        why = "scaled over the batch there, within a group here, or not at all"
        return Made("grpo", why, loud=Rank.LOSS)
    return None if scale is None else ("dr_grpo" if scale in ("none", False, None) else "grpo")


def kl_in_reward(inside: Any, estimator: Any, beta: Any) -> Any:
    """KL in the reward: on by default for advantages other than GRPO's."""
    inside = estimator in ("rloo", "reinforce_plus_plus") if inside is None else flag(inside)
    return Left(mean.IN_LOSS, loud=Rank.LOSS) if inside and beta else Left("off, as it always is here")


def correction(mode: Any) -> Any:
    return either(mode, {name: name.split("_")[0] for name in MODES}, "no such correction here") if mode else None


# -------------------------------------------------------------------------------------------------------------- reward


def _functions(functions: Any, weights: Any) -> dict[str, float]:
    """Name of each reward function -> its weight."""
    names = [str(name) for name in (functions if isinstance(functions, list) else [functions])] if functions else []
    given = weights if isinstance(weights, list) else [] if weights is None else [weights]
    if given and len(given) < len(names):
        raise ValueError(f"{len(names)} reward functions and {len(given)} weights")
    return dict(zip(names, map(number, given or [1.0] * len(names)), strict=False))  # then reward models' weights


def verifier(functions: Any) -> Any:
    names = _functions(functions, None)
    others = [name for name in names if name not in (*VERIFIED, "soft_overlong")]
    known = [name for name in names if name in VERIFIED]
    if not known:
        return Made(mean.OWN_FUNCTION, "name your own here") if others else None
    why = f"without counterpart: {', '.join(others)}" if others else ""
    return Made(VERIFIED[known[0]], why)


def left_functions(functions: Any) -> Any:
    names = _functions(functions, None)
    others = ", ".join(name for name in names if name not in (*VERIFIED, "soft_overlong"))
    if not others:
        return None
    if names.keys() & VERIFIED.keys():
        return Left(f"REWARD FUNCTION {others} IS NOT CARRIED OVER: only accuracy counts here", loud=Rank.TASK)
    return mean.not_carried_over(f"REWARD FUNCTION {others}")


def correct(functions: Any, weights: Any) -> Any:
    return _functions(functions, weights).get("accuracy")


def incorrect(functions: Any) -> Any:
    return Made(0.0, "accuracy is 1 or 0 there") if "accuracy" in _functions(functions, None) else None


def _overlong(cache: Any, limit: Any, response: Any, functions: Any, weights: Any) -> tuple[int, float]:
    """Buffer and penalty that, before max_completion_length, punish every length as theirs do before
    soft_max_length."""
    weight = _functions(functions, weights).get("soft_overlong", 0.0)
    if not weight or cache is None:
        return 0, 1.0
    buffer = whole(response) - (whole(response if limit is None else limit) - whole(cache))
    return (buffer, weight * buffer / whole(cache)) if buffer > 0 else (0, 1.0)


def overlong_buffer(*overlong: Any) -> Any:
    made, _ = _overlong(*overlong)
    if not made:
        return Left("soft_overlong is not among the reward_funcs")
    return made if made == overlong[0] else Made(made, "from the start of their punishment to max_completion_length")


def overlong_penalty(*overlong: Any) -> Any:
    buffer, penalty = _overlong(*overlong)
    return penalty if buffer else None


def max_gen_batches(times: Any, dynamic: Any) -> Any:
    if not flag(dynamic):
        return Left("dynamic_sample is false")
    return Made(whole(times) + 1, "the first generation batch counts here")


def on_limit(dynamic: Any) -> Any:
    return Made("unfiltered", "they take the first batch unfiltered") if flag(dynamic) else None


def metric(dynamic: Any, functions: Any) -> Any:
    return Made("seq_reward", "the sum of their rewards, length punishment included") if flag(dynamic) else None


def run_ahead(asynchronous: Any) -> Any:
    return Made(1.0, "they sample with the weights of the previous round") if flag(asynchronous) else None
