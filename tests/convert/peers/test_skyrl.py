"""SkyRL's keys: what becomes of each, and what is said of those that train something else."""

from __future__ import annotations

from typing import Any

import pytest

from asyncdapo.convert.command import converted
from tests.convert.test_convert import convert

DYNAMIC = "trainer.algorithm.dynamic_sampling."
CORRECTION = "trainer.algorithm.off_policy_correction."
EVALUATION = "generator.eval_sampling_params."
DATA = "data.train_data=gsm8k.parquet"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("generator.chat_template_kwargs.enable_thinking=false", {"prompts.chat_template": {"enable_thinking": False}}),
        ("trainer.algorithm.clip_ratio_c=3", {"loss.dual_clip": None}),
        (
            "generator.inference_engine.gpu_memory_utilization=0.7",
            {"rollout.engine": "vllm", "rollout.memory_fraction": 0.7},
        ),
        (
            "trainer.algorithm.eps_clip_low=0.1 trainer.algorithm.eps_clip_high=0.3",
            {"loss.clip_low": 0.1, "loss.clip_high": 0.3},
        ),
        (
            f"{DYNAMIC}type=filter {DYNAMIC}max_sample_batches=7",
            {"filter.enabled": True, "filter.max_gen_batches": 7},
        ),
        (
            f"{DYNAMIC}type=filter {DYNAMIC}max_sample_batches=-1",
            {"filter.max_gen_batches": 0},
        ),
        (
            f"{DYNAMIC}type=replace",
            {"filter.enabled": True, "filter.mode": "replace"},
        ),
        (
            f"{DYNAMIC}type=null",
            {"filter.enabled": False},
        ),
        (
            "trainer.algorithm.loss_reduction=token_mean_legacy",
            {"loss.agg": "token-mean"},
        ),
        (
            "trainer.algorithm.loss_reduction=sequence_mean",
            {"loss.agg": "seq-mean-token-mean"},
        ),
        (
            "trainer.algorithm.loss_reduction=prompt_mean",
            {"loss.agg": "prompt-mean"},
        ),
        (
            "generator.apply_overlong_filtering=true",
            {"reward.overlong_filter": True, "loss.kl_coef": 0.001},
        ),
        (
            "trainer.algorithm.off_policy_correction.sequence_mask_metric=geometric "
            "trainer.algorithm.off_policy_correction.geo_mask_high=1.1 "
            "trainer.algorithm.off_policy_correction.geo_mask_low=0.9",
            {
                "loss.anchor": "proximal",
                "loss.correction": "geometric",
                "loss.correction_mode": "mask",
                "loss.correction_band": [0.9, 1.1],
            },
        ),
        (
            "trainer.fully_async.enabled=true trainer.fully_async.max_staleness_steps=3 "
            "trainer.policy_mini_batch_size=32",
            {"replay.max_staleness": 3, "replay.run_ahead": 3.0, "replay.prompts_per_step": 32},
        ),
        (
            "trainer.gradient_checkpointing=true",
            {"learner.activation_checkpointing": "full"},
        ),
        (DATA, {"eval.temperature": 0.0}),
        (f"{EVALUATION}temperature=0.6", {"eval.temperature": 0.6}),
        (f"{EVALUATION}top_p=0.95", {"eval.temperature": 1.0, "eval.top_p": 0.95}),
        (f"{EVALUATION}top_k=20", {"eval.temperature": 1.0, "eval.top_k": 20}),
        ("data.val_data=/x/gsm8k/test.parquet", {"eval.num_prompts": 1319}),
        (
            f"{CORRECTION}tis_ratio_type=sequence",
            {"loss.anchor": "proximal", "loss.correction": "sequence", "loss.correction_band": [0.0, 5.0]},
        ),
        (f"{CORRECTION}sequence_mask_metric=geometric", {"loss.correction_band": [0.99, 1.01]}),
        ("trainer.algorithm.policy_loss_type=dual_clip", {"loss.dual_clip": 3.0}),
        (
            "trainer.algorithm.policy_loss_type=sapo trainer.algorithm.sapo.tau_neg=1.1 "
            "trainer.algorithm.eps_clip_low=0.2",
            {"loss.variant": "sapo", "loss.sapo_tau": [1.0, 1.1], "loss.clip_low": None},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_key_of_theirs_is_our_key(words: str, expected: dict[str, Any]) -> None:
    made = convert("skyrl", *words.split())
    assert {key: made.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("word", "off", "said"),
    [
        ("trainer.policy.model.lora.rank=32", "trainer.policy.model.lora.rank=0", "full training here"),
        (
            "trainer.algorithm.policy_loss_type=rollout_is",
            "trainer.algorithm.policy_loss_type=gspo",
            "no such loss here",
        ),
        ("generator.sampling_params.top_p=0.9", "generator.sampling_params.top_p=1.0", "the whole distribution"),
        (
            "trainer.policy.optimizer_config.scheduler=cosine",
            "trainer.policy.optimizer_config.scheduler=constant_with_warmup",
            "constant after warm-up",
        ),
    ],
)
def test_what_trains_something_else_is_said_at_the_top(word: str, off: str, said: str) -> None:
    assert [said in line for line in converted("skyrl", [DATA, word])[1].loud if line.startswith(word[:20])] == [True]
    assert not any(said in line for line in converted("skyrl", [DATA, off])[1].loud)


def test_its_overlong_punishment_is_spoken_of_only_where_there_is_one() -> None:
    assert "main_dapo.py" not in converted("skyrl", [DATA])[0]
    assert "main_dapo.py" in converted("skyrl", [DATA, "trainer.algorithm.overlong_buffer_len=16"])[0]
