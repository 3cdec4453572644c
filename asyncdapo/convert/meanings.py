"""Conversions that several peers share: functions from their values to ours, for the tables of rules."""

from __future__ import annotations

from math import ceil
from typing import Any

from asyncdapo.convert.rules import Differs, Left, Made, Rank, Rule, either, flag, number, plain, whole

NO_LIMIT = 1_000_000
"""Train steps of a run that ends with its data."""

# Why a key has no line.
IN_LOSS = "a KL penalty is part of the loss here: loss.kl_coef"
PARALLEL = (
    "no tensor, pipeline or expert parallelism in the learner here: learner.shards divides weights, gradients and "
    "AdamW among ranks, which gather a block at a time"
)
SEQUENCE = (
    "a rank computes whole sequences here: learner.activation_checkpointing and learner.tokens_per_microbatch set "
    "their memory, and asyncdapo plan says whether they fit"
)
BETWEEN = (
    "moves them out of the engine's way between sampling and training there; here the learner has its own part of the "
    "memory, and learner.offload=optimizer keeps weights and AdamW on the host all the time"
)
SPEED = "an implementation's own setting of speed or memory, without effect on results"
OWN_FUNCTION = "path/to/file.py:function"
"""Placeholder for a verifier that the user has to name; a launch refuses it."""
OWN_GPUS = "controller.placement, learner.ranks and rollout.num_workers decide the use of GPUs here"
ENGINE = "the engine has other settings here; rollout.engine_args passes arguments to vLLM"
CONSTANT = "the learning rate is constant after warm-up here, unless learner.lr_schedule has it fall over run.steps"
ALL_WEIGHTS = "LoRA there, full training here: it takes more memory, and a learning rate for LoRA is too high for it"
ADVANTAGES = "loss.advantage is grpo here, or dr_grpo, rloo, maxrl, grpo_batch_std, reinforce_pp"
CRITIC = "there is no critic here"

SYNCHRONOUS = (
    Differs(
        "It samples and trains in turn; here sampling runs one step ahead: replay.run_ahead=0 turns that off",
        Rank.SAMPLING,
        lambda made: "replay.run_ahead" not in made,
    ),
    Differs(
        "Its ratio is against log-probs that the learner computes at the start of a step, as with "
        "loss.anchor=proximal; here it is against those of the policy that sampled",
        Rank.LOSS,
        lambda made: "loss.anchor" not in made,
    ),
)
SURPLUS = Differs(
    "Groups beyond a batch are thrown away there; here they go into the next batch",
    Rank.DETAIL,
    lambda made: made.get("filter.enabled", True) and made.get("filter.mode") != "replace",
)


# ------------------------------------------------------------------------------------------------- reward and advantage


def own_function(*theirs: Any) -> Any:
    """A user's reward function: theirs has other arguments."""
    named = ":".join(str(part) for part in theirs if part)
    return not_carried_over(f"REWARD FUNCTION {named}") if theirs[0] else None


def not_carried_over(what: str) -> Left:
    """For something that the user has to write again."""
    why = f"YOUR {what} IS NOT CARRIED OVER: reward.verifier={OWN_FUNCTION} (docs/reward.md)"
    return Left(why, loud=Rank.TASK)


def advantage_of(name: Any, table: dict[str, str]) -> Any:
    """Our advantage for theirs; if there is none, the output says that another one is used."""
    why = f"{CRITIC}; {ADVANTAGES}" if name == "gae" else ADVANTAGES
    return table.get(str(name)) or Left(f"IS NOT CARRIED OVER: {why}", loud=Rank.LOSS)


# ----------------------------------------------------------------------------------------------------------------- loss


def kl_coef(use: Any, coef: Any) -> Any:
    """The KL penalty's weight, 0 if the penalty is off."""
    return (number(coef) if coef is not None else None) if flag(use) else 0.0


def estimator(name: Any, use: Any, coef: Any, table: dict[str, str]) -> Any:
    """The estimator of the KL penalty, if there is a penalty."""
    if name is None:
        return None
    if not flag(use) or not coef:
        return Left("there is no KL penalty")
    return either(name, table, "it isn't one of k1, k2, k3")


def otherwise(theirs: str, why: str, rank: Rank, off: tuple[Any, ...] = ()) -> Rule:
    """Rule for a key that changes training, unless its value is empty or one of `off`."""

    def value(given: Any) -> Left:
        if not given or given in off:
            return Left("off, as it always is here" if not given else "as it is here")
        return Left(why, loud=rank)

    return Rule("", (theirs,), value)


def known_loss(name: Any, table: dict[str, str]) -> Any:
    """Our loss for theirs; if there is none, the output says that another one is used."""
    return table.get(str(name)) or Left("no such loss here: PPO's clipped one is used instead", loud=Rank.LOSS)


def soft_gate(pos: Any, neg: Any, variant: Any) -> Any:
    """The temperatures of SAPO's gate, for positive and for negative advantages."""
    if variant != "sapo" or (pos is None and neg is None):
        return None if pos is None else Left("their loss is another")
    return [1.0 if pos is None else number(pos), 1.05 if neg is None else number(neg)]


def whole_distribution(value: Any) -> Left:
    """Top-p and top-k in training."""
    if value in (None, 1, -1, 0):
        return Left("off, as it is by default here")
    narrow = "rollout.engine=torch has rollout.top_p and rollout.top_k"
    return Left(f"training samples from the whole distribution with vLLM here; {narrow}", loud=Rank.SAMPLING)


# ------------------------------------------------------------------------------------------------------ batch and clock


def ceil_of(value: float) -> Any:
    """Rounded up to the whole number that our key takes."""
    return int(value) if value == int(value) else Made(ceil(value), f"{value:g} there; a whole multiple here")


def group(completions: Any) -> Any:
    """Completions of a prompt."""
    if completions != 1:
        return None if completions is None else whole(completions)
    return Left("a group of one has no baseline here: our default of rollout.group_size is used", loud=Rank.LOSS)


def updates(prompts: Any, mini: Any) -> Any:
    """Mini-batches of a train step. Step and mini-batch are given in prompts."""
    if prompts is None or mini is None:
        return None
    prompts, mini = whole(prompts), whole(mini)
    return even(prompts, prompts / mini)


def even(prompts: int, at_least: float) -> Any:
    """The least number of updates, at least `at_least`, that divides the prompts evenly."""
    at_least = min(max(1, at_least), prompts)
    made = next(count for count in range(ceil(at_least), prompts + 1) if prompts % count == 0)
    return made if made == at_least else Made(made, f"{at_least:g} there; even mini-batches here")


def warmup(steps: Any, updates_of_step: Any) -> Any:
    """Warm-up in optimizer updates; theirs is in train steps."""
    if steps is None:
        return None
    per_step = plain(updates_of_step) or 1
    why = f"{steps} train steps there, each of {per_step} updates" if per_step != 1 else ""
    return Made(whole(steps) * per_step, why)


def share_of_steps() -> Left:
    """For a warmup that is a ratio of the steps, if their number depends on the length of the data."""
    return Left("a share of the steps, whose number isn't known: set learner.warmup_steps", loud=Rank.SCHEDULE)


def every(value: Any) -> Any:
    """Steps between evaluations; less than 1: never."""
    return None if value is None else max(0, whole(value))


def saves(value: Any) -> Any:
    """Steps between checkpoints."""
    if value is None:
        return None
    if whole(value) < 1:
        return Left("the first and the last checkpoint are always written here, by default every 50 steps too")
    return whole(value)


def checkpointing(on: Any) -> str:
    """Activation checkpointing; theirs is of whole blocks."""
    return "full" if flag(on) else "none"


def offload(*on: Any) -> Any:
    """`optimizer` if any of them is on."""
    return "optimizer" if any(map(flag, on)) else "none"


def reshard(after_forward: Any) -> Any:
    """Whether weights are gathered again for the backward pass; a number there divides them among so many GPUs."""
    if after_forward is None or after_forward in (True, False):
        return None if after_forward is None else flag(after_forward)
    return Made(True, f"{whole(after_forward)} GPUs divide them between the passes there, all shards here")


def kept_checkpoints(value: Any) -> Any:
    """Number of checkpoints to keep; null and negative: all."""
    return 0 if value is None or whole(value) < 1 else whole(value)


def sinks(loggers: Any) -> Any:
    """Those of the loggers that are sinks here."""
    if loggers is None:
        return None
    given = loggers if isinstance(loggers, list) else [loggers]
    known = [name for name in given if name in ("wandb", "tensorboard", "trackio")]
    others = [str(name) for name in given if name not in (*known, "console", "none", None)]
    return Made(known, f"{', '.join(others)} isn't a sink here") if others else known


def top_k(value: Any) -> Any:
    """Top-k. No limit is -1 there and 0 here."""
    return None if value is None else max(0, whole(value))


def engine(name: Any) -> Any:
    """Our engine: torch for `hf`, vLLM for every other one."""
    if name is None:
        return None
    return "vllm" if name == "vllm" else Made("torch" if name == "hf" else "vllm", f"{name} isn't known here")


def dual_clip(bound: Any) -> Any:
    """The dual clip's bound, null if theirs is off; ours is on by default."""
    return Made(None, "off by default there") if bound is None else number(bound)


def dtype(name: Any) -> Any:
    """Number format of the engine."""
    if name is None:
        return None
    table = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"}
    table |= {"float16": "float16", "fp16": "float16", "half": "float16"}
    return table.get(name) or Made("bfloat16", f"{name} isn't known here")
