"""Functions from NeMo RL's values to ours, for the table of rules in nemo_rl.py."""

from __future__ import annotations

from typing import Any

from asyncdapo.convert import meanings as mean
from asyncdapo.convert.gpus import Gpus, number_of
from asyncdapo.convert.rules import Left, Made, Rank, either, flag, number, plain, whole

OTHERWISE: tuple[tuple[str, str, Rank, tuple[Any, ...]], ...] = (
    ("on_policy_distillation.enabled", "no distillation here", Rank.TASK, ()),
    ("policy.dtensor_cfg.lora_cfg.enabled", mean.ALL_WEIGHTS, Rank.LOSS, ()),
    ("policy.megatron_cfg.peft.enabled", mean.ALL_WEIGHTS, Rank.LOSS, ()),
    ("loss_fn.use_kl_in_reward", mean.IN_LOSS, Rank.LOSS, ()),
    ("loss_fn.disable_ppo_ratio", "no loss without a ratio here", Rank.LOSS, ()),
    ("loss_fn.positive_example_nll_weight", "the likelihood of right answers is not added here", Rank.LOSS, ()),
    ("loss_fn.force_on_policy_ratio", "the ratio is never set to 1 here", Rank.LOSS, ()),
    ("loss_fn.use_on_policy_kl_approximation", "the KL estimate has no such weight here", Rank.LOSS, ()),
    ("grpo.advantage_clip_low", "advantages are not clipped here", Rank.LOSS, ()),
    ("grpo.advantage_clip_high", "advantages are not clipped here", Rank.LOSS, ()),
    ("grpo.seq_logprob_error_threshold", "loss.outlier_band masks here, by a ratio", Rank.LOSS, ()),
    *(
        (f"reward_penalties.{key}", "no such punishment here", Rank.LOSS, ())
        for key in (
            *("penalize_duplicated_reasoning", "penalize_empty_final_answer", "penalize_unwanted_tokens"),
            "penalize_malformed_think_tag",
        )
    ),
    ("policy.draft.enabled", "no draft model is trained here", Rank.DETAIL, ()),
)
"""(key, reason, rank, harmless values): keys that change training unless empty or harmless."""
VERIFIERS = {"dapo_math_verify": "dapo", "hf_math_verify": "math_verify"}


def updates_per_step(prompts: Any, group: Any, update: Any) -> Any:
    """Updates of a train step; their batch of an update counts completions."""
    if None in (prompts, group, update):
        return None
    if whole(update) < whole(group):
        return Made(whole(prompts), "less than a group in an update there, a whole group here")
    return mean.even(whole(prompts), whole(prompts) * whole(group) / whole(update))


def _per_step(*step: Any) -> int:
    return plain(updates_per_step(*step)) or 1


def response_length(new: Any, total: Any, prompt: Any) -> Any:
    """The lower of two limits: that of a response, and what the longest prompt leaves of the sequence."""
    left = whole(total) - whole(prompt) if total and prompt and prompt < total else None
    if left is not None and (new is None or left < new):
        return Made(left, "what max_total_sequence_length leaves after the longest prompt")
    return None if new is None else whole(new)


def _overlong(enabled: Any, buffer: Any, penalty: Any, limit: Any, properly: Any, *lengths: Any) -> tuple[int, float]:
    """Buffer and penalty that, before our limit, punish every length as theirs do before their own limit."""
    response = plain(response_length(*lengths))
    if not flag(enabled) or properly is not None or buffer is None:
        return 0, 1.0
    begin = whole(limit if limit is not None else lengths[1]) - whole(buffer)
    ours = (response if response is not None else whole(limit)) - begin
    return (ours, number(1 if penalty is None else penalty) * ours / whole(buffer)) if ours > 0 else (0, 1.0)


def overlong_buffer(buffer: Any, enabled: Any, *others: Any) -> Any:
    made, _ = _overlong(enabled, buffer, *others)
    if flag(enabled) and buffer is not None and made != buffer:
        return Made(made, "from the start of their punishment to rollout.max_response_length")
    return made


def overlong_penalty(penalty: Any, enabled: Any, buffer: Any, *others: Any) -> Any:
    length, made = _overlong(enabled, buffer, penalty, *others)
    if not length:
        return Left("reward_shaping has no length punishment here") if penalty is not None else None
    return made


def scaled(at: float, *scaling: Any) -> Any:
    """The reward of the verdict `at` (0 or 1) by their linear map."""
    enabled, source_min, source_max, target_min, target_max = (
        given if given is not None else default for given, default in zip(scaling, (False, 0, 1, 0, 1), strict=True)
    )
    if not flag(enabled):
        return at
    inside = min(max(at, number(source_min)), number(source_max)) - source_min
    return number(target_min) + inside / (source_max - source_min) * (target_max - target_min)


def multiplier(factor: Any, enabled: Any) -> Any:
    if factor is None or not flag(enabled):
        return Left("use_dynamic_sampling is false") if factor is not None else None
    return mean.ceil_of(number(factor))


def gen_batches(limit: Any, enabled: Any) -> Any:
    """Most generation batches; they raise when one more than the limit was not enough."""
    if not flag(enabled):
        return Left("use_dynamic_sampling is false")
    return None if limit is None else Made(whole(limit) + 1, "their limit is checked after one more batch")


def advantage(normalize: Any, leave_one_out: Any, name: Any, own_normalize: Any, own_leave_one_out: Any) -> Any:
    """Our advantage; the estimator's own keys take precedence."""
    if name not in (None, "grpo"):
        return None
    normalize = normalize if own_normalize is None else own_normalize
    leave_one_out = leave_one_out if own_leave_one_out is None else own_leave_one_out
    if not flag(normalize):
        return "rloo" if flag(leave_one_out) else "dr_grpo"
    if not flag(leave_one_out):
        return "grpo"
    why = "use_leave_one_out_baseline leaves a completion out of its own mean and deviation there, which scales it"
    return Made("grpo", why, loud=Rank.LOSS)


def stop_properly(factor: Any, shaping: Any) -> Left:
    """Their factor on the reward of a truncated response has no counterpart."""
    if factor in (None, 1) or not flag(shaping):
        return Left("off, as it always is here")
    why = f"the reward of a truncated response is multiplied by {factor} there: reward.overlong_filter, overlong_buffer"
    return Left(why, loud=Rank.TASK)


def variant(sequence: Any, cispo: Any) -> Any:
    return "cispo" if flag(cispo) else "gspo" if flag(sequence) else None


def correction(use: Any, kind: Any) -> Any:
    if not flag(use):
        return Left("use_importance_sampling_correction is false") if kind else None
    return "geometric" if kind == "seq-mask-tis" else "token"


def correction_mode(kind: Any, use: Any) -> Any:
    return "mask" if flag(use) and kind in ("icepop", "seq-mask-tis") else None


def band(high: Any, low: Any, use: Any, kind: Any) -> Any:
    if not flag(use):
        return Left("use_importance_sampling_correction is false") if high is not None else None
    if kind is None or high is None:
        return Made([0.0, 1e9], "theirs has no bound")
    return [0.0 if kind == "tis" else number(low or 0), number(high)]


def warmup(scheduler: Any, *step: Any) -> Any:
    """Their warm-up is a LinearLR scheduler, which advances once a train step."""
    parts = scheduler if isinstance(scheduler, list) else []
    if parts and all(str(part.get("name", "")).endswith("ConstantLR") for part in parts if isinstance(part, dict)):
        return None
    linear = [part for part in parts if isinstance(part, dict) and str(part.get("name", "")).endswith("LinearLR")]
    if len(linear) != 1:
        return Left("only a warm-up by LinearLR, constant after it, has a counterpart", loud=Rank.SCHEDULE)
    return mean.warmup((linear[0].get("kwargs") or {}).get("total_iters"), _per_step(*step))


def megatron(value: Any, enabled: Any) -> Any:
    return number(value) if flag(enabled) and value is not None else None


def offload(on: Any, enabled: Any) -> Any:
    return mean.offload(on) if flag(enabled) else Left("megatron_cfg.enabled is false")


def verifier(name: Any, own: Any, default: Any, *data: Any) -> Any:
    """Our verifier for theirs of the environment `math`."""
    if (own or default or "math") != "math":
        return Made(mean.OWN_FUNCTION, "name your own here")
    if name is None:
        return Made("math_verify", "their default")
    return either(name, VERIFIERS, "no such verifier here: see docs/reward.md")


def own_environment(name: Any) -> Any:
    return mean.not_carried_over(f"ENVIRONMENT {name}") if name not in (None, "math") else None


def tokenizer(name: Any, model: Any) -> Any:
    return name if name != model else Left("the model's own, the default here")


def microbatch(completions: Any, total: Any, packing: Any, packed: Any) -> Any:
    if flag(packing) and isinstance(packed, int):
        return packed
    if completions is None or total is None:
        return None
    return Made(whole(completions) * whole(total), "completions there, computed tokens here")


def gpus_of(nodes: Any, each: Any, parallel: Any, together: Any) -> Gpus | None:
    if each is None:
        return None
    total = number_of(nodes, each)
    return Gpus(total=total, parallel=whole(parallel or 1), together=flag(together))


def when_async(value: Any, enabled: Any) -> Any:
    return whole(value) if flag(enabled) and value is not None else Left("async_grpo.enabled is false")
