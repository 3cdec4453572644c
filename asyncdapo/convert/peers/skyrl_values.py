"""Functions from SkyRL's values to ours, for the table of rules in skyrl.py."""

from __future__ import annotations

from typing import Any

from asyncdapo.convert import data_files
from asyncdapo.convert import meanings as mean
from asyncdapo.convert.gpus import Gpus, number_of
from asyncdapo.convert.rules import Left, Made, Rank, either, flag, number, plain, whole

VERIFIERS = {"gsm8k": "gsm8k", "aime": "dapo"}
ALGORITHM, SAMPLING, POLICY = "trainer.algorithm.", "generator.sampling_params.", "trainer.policy."
OTHERWISE: tuple[tuple[str, str, Rank, tuple[Any, ...]], ...] = (
    (
        "generator.step_wise_trajectories",
        "an episode has one advantage here, and a row for each of its contexts",
        Rank.LOSS,
        (),
    ),
    ("generator.vision_language_generator", "prompts have no images here", Rank.TASK, ()),
    (
        "generator.zero_reward_on_non_stop",
        "no such reward here: reward.overlong_filter, reward.overlong_buffer",
        Rank.TASK,
        (),
    ),
    (f"{POLICY}model.lora.rank", mean.ALL_WEIGHTS, Rank.LOSS, ()),
    (f"{ALGORITHM}use_kl_in_reward", mean.IN_LOSS, Rank.LOSS, ()),
    (f"{ALGORITHM}advantage_batch_normalize", "advantages are normalised within a group here", Rank.LOSS, ()),
    ("trainer.update_ref_every_epoch", "the reference model never changes here", Rank.LOSS, ()),
    (f"{SAMPLING}min_p", "training samples from the whole distribution here", Rank.SAMPLING, ()),
    (f"{POLICY}optimizer_config.scheduler", mean.CONSTANT, Rank.SCHEDULE, ("constant_with_warmup", "constant")),
)
"""(key, reason, rank, harmless values): keys that change training unless empty or harmless."""
REDUCTIONS = {
    "token_mean": "token-mean",
    "token_mean_legacy": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "seq_mean_token_sum_norm": "seq-mean-token-sum-norm",
    "prompt_mean": "prompt-mean",
}


def prompts_per_step(train: Any, mini: Any, is_async: Any) -> Any:
    if flag(is_async):
        return Made(whole(mini), "every mini-batch is a step in their asynchronous training")
    return None if train is None else whole(train)


def updates_per_step(train: Any, mini: Any, is_async: Any) -> Any:
    return 1 if flag(is_async) else mean.updates(train, mini)


def gpus_of(nodes: Any, each: Any, parallel: Any, together: Any, engines: Any) -> Gpus | None:
    """GPU counts; their number of engines matters only if engines have GPUs of their own."""
    if each is None and (flag(together) or engines is None):
        return None
    own = whole(engines or 1) if not flag(together) else None
    total = number_of(nodes, each)
    return Gpus(total=total, parallel=whole(parallel or 1), together=flag(together), engines=own)


def reduction(name: Any, variant: Any) -> Any:
    if name == "token_mean_legacy":
        return Made("token-mean", "the legacy one is the mean of the micro-batches' means")
    if name == "seq_mean_token_sum_norm":
        return Made(REDUCTIONS[name], "normalised by rollout.max_response_length here, by max_seq_len there")
    return either(name, REDUCTIONS, "no such reduction here")


def clip(bound: Any, variant: Any, cispo: Any) -> Any:
    """A bound of the ratio; CISPO has keys of its own, SAPO has none."""
    if variant == "sapo":
        return Left("their sapo has no clip")
    bound = cispo if variant == "cispo" else bound
    return None if bound is None else number(bound)


def dual_clip(bound: Any, loss: Any) -> Any:
    return mean.dual_clip(bound) if loss == "dual_clip" else Made(None, f"policy_loss_type {loss} has no such bound")


def advantage(name: Any, by_std: Any) -> Any:
    if name == "grpo" and by_std is not None and not flag(by_std):
        return "dr_grpo"
    return None if name is None else mean.advantage_of(name, {"grpo": "grpo", "rloo": "rloo"})


def dynamic(kind: Any, whole_batch: Any) -> Any:
    if kind not in (None, "filter", "replace"):
        return Left("no such dynamic sampling here: filter, replace")
    return kind is not None or flag(whole_batch)


def gen_batches(limit: Any, kind: Any) -> Any:
    if kind != "filter":
        return Left(f"dynamic_sampling.type is {kind}")
    return max(0, whole(limit))


def correction(tis: Any, mask: Any) -> Any:
    table = {"token": "token", "sequence": "sequence", "product": "sequence", "geometric": "geometric"}
    return either(tis or mask, table, "no such correction here") if tis or mask else None


def mask_too(mask: Any, tis: Any) -> Any:
    if mask and tis:
        return Left("one correction only here: the weight of tis_ratio_type", loud=Rank.LOSS)
    return "mask" if mask else None


def anchor(*corrections: Any) -> Any:
    return "proximal" if any(corrections) else None


def band(high: Any, low: Any, kind: Any, tis: Any, wanted: str) -> Any:
    """The band of the correction `wanted`, weight or mask, if that one is on."""
    if kind != wanted or (tis is not None and tis != kind):
        return Left("its correction is off") if high is not None else None
    return [number(low or 0), number(high)]


def outliers(low: Any, high: Any) -> Any:
    if low is None and high is None:
        return None
    return [number(low or 0), number(high if high is not None else 1e9)]


def verifier(environment: Any) -> Any:
    return VERIFIERS.get(str(environment)) or Made(mean.OWN_FUNCTION, "name your own here")


def own_environment(name: Any) -> Any:
    return None if name in VERIFIERS else mean.not_carried_over(f"ENVIRONMENT {name}")


def eval_temperature(value: Any, *others: Any) -> Any:
    """Their evaluation is greedy by default; with any sampling parameter its temperature is 1."""
    if value is None:
        return Made(1.0 if any(other is not None for other in others) else 0.0, "their default")
    return number(value)


def eval_samples(count: Any, files: Any, *evaluated: Any) -> Any:
    if not plain(eval_temperature(*evaluated)):
        return Left("their evaluation is greedy, so all would be the same") if count not in (None, 1) else count
    return data_files.samples(count, files)


def microbatch(completions: Any, prompt: Any, response: Any) -> Any:
    if completions is None:
        return None
    return Made(whole(completions) * (whole(prompt) + whole(response)), "completions there, computed tokens here")
