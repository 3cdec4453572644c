"""Functions from ms-swift's values to ours, for the table of rules in ms_swift.py."""

from __future__ import annotations

from typing import Any

from asyncdapo.convert import meanings as mean
from asyncdapo.convert.gpus import Gpus, number_of
from asyncdapo.convert.rules import Left, Made, either, flag, number, plain, whole

LOSSES = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}
LEVELS = {"token": "ppo", "sequence": "gspo"}
VERIFIED = {"accuracy": "math_verify"}
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


# ------------------------------------------------------------------------------------------------ batches and the clock


def _sizes(
    generation: Any, per_device: Any, accumulation: Any, steps: Any, processes: Any, nodes: Any, world: Any, group: Any
) -> tuple[int, int] | None:
    """Completions of a generation batch and of an optimizer update; None where the script leaves them open."""
    if world is not None:  # Megatron's
        return whole(generation if generation is not None else world * (steps or 1)), whole(world)
    if generation is None and per_device is None:
        return None
    accumulated = whole(accumulation or 1)
    forward = whole(per_device or 1) * whole(processes or 1) * whole(nodes or 1)
    batch = whole(generation) if generation is not None else forward * whole(steps or accumulated)
    return batch, forward * accumulated


def prompts_per_step(*sizes: Any) -> Any:
    made = _sizes(*sizes)
    if made is None:
        return None
    if made[0] % whole(sizes[-1]):
        raise ValueError(f"{made[0]} completions are not whole groups of {sizes[-1]}")
    return Made(made[0] // whole(sizes[-1]), f"{made[0]} completions a generation batch there, prompts here")


def updates_per_step(*sizes: Any) -> Any:
    made = _sizes(*sizes)
    return None if made is None else mean.ceil_of(made[0] / made[1], "whole mini-batches")


def _updates_of_step(*clock: Any) -> int:
    return (plain(updates_per_step(*clock[:-1])) or 1) * whole(clock[-1] or 1)


def in_steps(updates: Any, *clock: Any) -> Any:
    """Their steps are optimizer updates."""
    if updates is None or number(updates) <= 0:
        return None
    if updates < 1:
        return Left("a share of the steps, whose number isn't known")
    per_step = _updates_of_step(*clock)
    why = f"{updates} optimizer updates there, {per_step} of which are a train step" if per_step > 1 else ""
    return Made(max(1, whole(updates) // per_step), why)


def epochs(passes: Any, steps: Any, files: Any) -> Any:
    """Their number of steps wins over that of epochs."""
    return Left("max_steps counts") if steps is not None and number(steps) > 0 else mean.epochs(passes, files)


def warmup(updates: Any, steps: Any) -> Any:
    """Less than 1 is a share of all."""
    if not updates:
        return None
    if number(updates) >= 1:
        return whole(updates)
    if steps is None or whole(steps) <= 0:
        return Left("a share of the steps, whose number isn't known: set learner.warmup_steps")
    return Made(int(number(updates) * whole(steps)), f"of {steps} optimizer updates")


def microbatch(per_device: Any, response: Any, prompt: Any) -> Any:
    if per_device is None or prompt is None:
        return None
    return Made(whole(per_device) * (whole(response) + whole(prompt)), "completions there, computed tokens here")


def gpus_of(processes: Any, nodes: Any, parallel: Any, mode: Any, *sizes: Any) -> Gpus | None:
    if processes is None:
        return None
    own = Left("the rollout server is started apart there: set rollout.num_workers") if mode == "server" else None
    total, groups = number_of(nodes, processes), _groups_per_update(*sizes)
    return Gpus(total=total, parallel=whole(parallel or 1), groups=groups, together=own is None, engines=own)


def _groups_per_update(*sizes: Any) -> int:
    made = _sizes(*sizes)
    return max(1, made[1] // whole(sizes[-1])) if made else 1_000_000


# ---------------------------------------------------------------------------------------------------------------- loss


def variant(loss: Any, level: Any) -> Any:
    if loss == "cispo":
        return "cispo"
    if loss not in (None, *LOSSES):
        return Left(f"no loss {loss} here: {', '.join(LOSSES)}")
    return None if level is None else either(level, LEVELS, "no such ratio here: token, sequence")


def aggregation(loss: Any) -> Any:
    why = {"bnpo": "over all processes here, as their dapo", "dr_grpo": ""}.get(str(loss), "")
    made = either(loss, LOSSES, f"no loss {loss} here: {', '.join(LOSSES)}")
    return made if isinstance(made, Left) else Made(made, why)


def clip_low(epsilon: Any, loss: Any) -> Any:
    return Made(1.0, "their cispo has no lower bound") if loss == "cispo" else number(epsilon)


def clip_high(high: Any, epsilon: Any, loss: Any) -> Any:
    bound = number(epsilon if high is None else high)
    return Made(bound - 1, "the bound itself there, its distance from 1 here") if loss == "cispo" else bound


def dual_clip(delta: Any, loss: Any) -> Any:
    if delta is None:
        return None
    return (
        Left("their cispo has none")
        if loss == "cispo"
        else Made(number(delta), "their bound on the ratio does the same")
    )


def advantage(estimator: Any, scale: Any) -> Any:
    if estimator not in (None, "grpo", "rloo"):
        return mean.advantage_of(estimator, {})
    if scale in ("batch", "gdpo"):
        return Left(f"scale_rewards {scale} has no counterpart")
    if estimator == "rloo":
        return "rloo"
    return None if scale is None else ("dr_grpo" if scale in ("none", False, None) else "grpo")


def scale_rewards(scale: Any) -> Any:
    if scale in ("batch", "gdpo"):
        return Left("rewards are scaled within a group here, or not at all")
    return None


def correction(mode: Any) -> Any:
    return either(mode, {name: name.split("_")[0] for name in MODES}, "no such correction here") if mode else None


# -------------------------------------------------------------------------------------------------------------- reward


def _functions(functions: Any, weights: Any) -> dict[str, float]:
    """Weight by the name of a reward function."""
    names = [str(name) for name in (functions if isinstance(functions, list) else [functions])] if functions else []
    given = weights if isinstance(weights, list) else [] if weights is None else [weights]
    if given and len(given) < len(names):
        raise ValueError(f"{len(names)} reward functions and {len(given)} weights")
    return dict(zip(names, map(number, given or [1.0] * len(names)), strict=False))  # reward models' come after


def verifier(functions: Any) -> Any:
    names = _functions(functions, None)
    others = [name for name in names if name not in (*VERIFIED, "soft_overlong")]
    known = [name for name in names if name in VERIFIED]
    if not known:
        return Made(mean.OWN_FUNCTION, "name your own here") if others else None
    why = f"without counterpart: {', '.join(others)}" if others else ""
    return Made(VERIFIED[known[0]], why)


def left_functions(functions: Any) -> Any:
    others = [name for name in _functions(functions, None) if name not in (*VERIFIED, "soft_overlong")]
    return mean.not_carried_over(f"REWARD FUNCTION {', '.join(others)}") if others else None


def correct(functions: Any, weights: Any) -> Any:
    return _functions(functions, weights).get("accuracy")


def incorrect(functions: Any) -> Any:
    return Made(0.0, "accuracy is 1 or 0 there") if "accuracy" in _functions(functions, None) else None


def _overlong(cache: Any, limit: Any, response: Any, functions: Any, weights: Any) -> tuple[int, float]:
    """Buffer and penalty before max_completion_length that punish every length as theirs do before soft_max_length."""
    weight = _functions(functions, weights).get("soft_overlong", 0.0)
    if not weight or cache is None:
        return 0, 1.0
    buffer = whole(response) - (whole(response if limit is None else limit) - whole(cache))
    return (buffer, weight * buffer / whole(cache)) if buffer > 0 else (0, 1.0)


def overlong_buffer(*overlong: Any) -> Any:
    made, _ = _overlong(*overlong)
    if not made:
        return Left("soft_overlong is not among the reward_funcs")
    return made if made == overlong[0] else Made(made, "from where their punishment begins to max_completion_length")


def overlong_penalty(*overlong: Any) -> Any:
    buffer, penalty = _overlong(*overlong)
    return penalty if buffer else None


def max_gen_batches(times: Any, dynamic: Any) -> Any:
    if not flag(dynamic):
        return Left("dynamic_sample is false")
    return Made(whole(times) + 1, "the first generation batch counts here")


def on_limit(dynamic: Any) -> Any:
    return Made("unfiltered", "they take the first batch as it was") if flag(dynamic) else None


def metric(dynamic: Any, functions: Any) -> Any:
    return Made("seq_reward", "the sum of their rewards, the punishment of length included") if flag(dynamic) else None


def run_ahead(asynchronous: Any) -> Any:
    return Made(1.0, "they sample with the weights of the round before") if flag(asynchronous) else None
