"""verl's keys, and siiRL's: what becomes of each, and what is said of those that train something else."""

from __future__ import annotations

from typing import Any

import pytest

from asyncdapo.convert.command import converted
from tests.convert.test_convert import VERL, convert

ACTOR = "actor_rollout_ref.actor."
MODEL = "actor_rollout_ref.model."
ROLLOUT = "actor_rollout_ref.rollout."
CORRECTION = "algorithm.rollout_correction."
VERL_FILTER = "algorithm.filter_groups."
DATA = "data.train_files=dapo-math-17k.parquet"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "data.train_files=/x/math/train.parquet +data.apply_chat_template_kwargs.enable_thinking=False",
            {"prompts.chat_template": {"enable_thinking": False}},
        ),
        (
            f"{ACTOR}clip_ratio_low=0.1 {ACTOR}clip_ratio_high=0.3",
            {"loss.clip_low": 0.1, "loss.clip_high": 0.3},
        ),
        (
            f"{ACTOR}clip_ratio_c=5",
            {"loss.dual_clip": 5},
        ),
        (f"{ACTOR}policy_loss.loss_mode=cispo", {"loss.dual_clip": None}),
        (
            f"{ACTOR}lr=1",
            {"loss.dual_clip": 3.0, "loss.clip_high": 0.2, "filter.enabled": False},
        ),
        (
            f"{ACTOR}loss_agg_mode=seq-mean-token-sum",
            {"loss.agg": "seq-mean-token-sum"},
        ),
        (
            f"{ACTOR}use_token_level_loss=False",
            {"loss.agg": "seq-mean-token-mean"},
        ),
        (
            f"{ACTOR}use_token_level_loss=True",
            {"loss.agg": "token-mean"},
        ),
        (
            f"data.gen_batch_size=96 data.train_batch_size=32 {VERL_FILTER}enable=True actor_rollout_ref.rollout.n=4",
            {"filter.gen_batch_multiplier": 3, "replay.prompts_per_step": 32},
        ),
        (
            f"data.gen_batch_size=80 data.train_batch_size=32 {VERL_FILTER}enable=True actor_rollout_ref.rollout.n=4",
            {"filter.gen_batch_multiplier": 3},
        ),
        (
            "data.gen_batch_size=96 data.train_batch_size=32",
            {"replay.prompts_per_step": 96},
        ),
        (
            "actor_rollout_ref.rollout.n=4",
            {"rollout.group_size": 4},
        ),
        (
            f"{VERL_FILTER}enable=True {VERL_FILTER}metric=seq_final_reward {VERL_FILTER}max_num_gen_batches=-1 "
            "actor_rollout_ref.rollout.n=4",
            {"filter.enabled": True, "filter.metric": "seq_final_reward", "filter.max_gen_batches": 0},
        ),
        (
            "reward_model.overlong_buffer.enable=True reward_model.overlong_buffer.len=64 "
            "reward_model.overlong_buffer.penalty_factor=0.5",
            {"reward.overlong_buffer": 64, "reward.overlong_penalty": 0.5},
        ),
        (
            "+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True "
            "+reward_model.reward_kwargs.overlong_buffer_cfg.len=64",
            {"reward.overlong_buffer": 64},
        ),
        (
            "reward_model.overlong_buffer.enable=False reward_model.overlong_buffer.len=64",
            {"reward.overlong_buffer": 0},
        ),
        (
            "data.max_prompt_length=100 data.max_response_length=200",
            {"prompts.max_prompt_length": 100, "rollout.max_response_length": 200},
        ),
        (
            f"{ACTOR}ppo_epochs=2 {ACTOR}ppo_mini_batch_size=8 data.train_batch_size=32 {ACTOR}optim.lr=3e-6 "
            f"{ACTOR}optim.lr_warmup_steps=5",
            {
                "learner.epochs": 2,
                "learner.updates_per_step": 4,
                "learner.lr": 3e-6,
                "learner.warmup_steps": 40,
                "replay.prompts_per_step": 32,
            },
        ),
        (
            f"{ACTOR}use_kl_loss=False {ACTOR}kl_loss_coef=0.01",
            {"loss.kl_coef": 0.0},
        ),
        (
            f"{ACTOR}use_kl_loss=True {ACTOR}kl_loss_coef=0.01 {ACTOR}kl_loss_type=mse",
            {"loss.kl_coef": 0.01, "loss.kl_estimator": "k2"},
        ),
        (
            f"{ACTOR}policy_loss.loss_mode=gspo",
            {"loss.variant": "gspo", "loss.agg": "seq-mean-token-mean"},
        ),
        (
            "async_training.staleness_threshold=0.5 async_training.trigger_parameter_sync_step=4 "
            f"async_training.require_batches=2 {ACTOR}ppo_mini_batch_size=8 async_training.partial_rollout=True "
            "async_training.use_rollout_log_probs=True rollout.total_rollout_steps=6400",
            {
                "replay.run_ahead": 0.5,
                "replay.max_staleness": 2,
                "replay.prompts_per_step": 64,
                "learner.updates_per_step": 8,
                "loss.anchor": "behavior",
                "run.steps": 100,
            },
        ),
        (
            "async_training.trigger_parameter_sync_step=4 async_training.require_batches=2 "
            f"{ACTOR}ppo_mini_batch_size=8 {ACTOR}optim.lr_warmup_steps=5 trainer.test_freq=3 rollout.test_freq=7 "
            "trainer.total_epochs=2 rollout.total_epochs=9 data.train_files=a.parquet",
            {"learner.warmup_steps": 10, "eval.every": 7, "prompts.epochs": 2},
        ),
        (
            "trainer.experiment_name=007",
            {"run.name": "007"},
        ),
        (
            "trainer.experiment_name=12 data.max_prompt_length=12",
            {"run.name": "12"},
        ),
        (
            "data.val_files=a.parquet",
            {"prompts.eval_path": "data/a/test.parquet"},
        ),
        (
            "actor_rollout_ref.model.enable_gradient_checkpointing=True",
            {"learner.activation_checkpointing": "full"},
        ),
        (
            "async_training.trigger_parameter_sync_step=4 rollout.total_epochs=3 data.train_files=a.parquet",
            {"prompts.epochs": 3},
        ),
        (
            f"{CORRECTION}rollout_is=token {CORRECTION}rollout_is_threshold=0.5_5.0",
            {"loss.correction": "token", "loss.correction_mode": "mask", "loss.correction_band": [0.5, 5.0]},
        ),
        (f"data.val_files=aime-2024.parquet {DATA}", {"eval.num_prompts": 30}),
        (f"data.val_files=/x/gsm8k/test.parquet {DATA}", {"eval.num_prompts": 1319}),
        (f"data.val_files=/x/gsm8k/test.parquet data.val_max_samples=100 {DATA}", {"eval.num_prompts": 100}),
        (f"data.val_files=mine.parquet {DATA}", {"eval.num_prompts": None}),
        ("trainer.n_gpus_per_node=4 rollout.n_gpus_per_node=4", {"replay.run_ahead": 1.0}),
        (f"{ACTOR}policy_loss.loss_mode=cispo {ACTOR}clip_ratio_low=10", {"loss.clip_low": 1.0}),
        (
            f"{ACTOR}policy_loss.loss_mode=geo_mean {ACTOR}clip_ratio_low=0.4 {ACTOR}clip_ratio_high=0.4",
            {"loss.variant": "gmpo", "loss.clip_low": 0.4, "loss.clip_high": 0.4, "loss.agg": "seq-mean-token-mean"},
        ),
        (
            f"{ACTOR}policy_loss.loss_mode=sapo {ACTOR}tau_neg=1.1 {ACTOR}clip_ratio_high=0.28",
            {"loss.variant": "sapo", "loss.sapo_tau": [1.0, 1.1], "loss.clip_high": None, "loss.dual_clip": None},
        ),
        (
            f"{ACTOR}policy_loss.loss_mode=dppo_tv {ACTOR}clip_ratio_high=0.15 {ACTOR}clip_ratio_c=20",
            {"loss.variant": "dppo_tv", "loss.clip_high": 0.15, "loss.dppo_ratio_cap": 20},
        ),
        ("algorithm.adv_estimator=reinforce_plus_plus", {"loss.advantage": "reinforce_pp"}),
        (f"{ROLLOUT}val_kwargs.do_sample=True", {"eval.temperature": 0.0}),
        ("data.train_files=/x/math/train.parquet", {"reward.verifier": "math_verify", "reward.incorrect": 0.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_key_of_theirs_is_our_key(words: str, expected: dict[str, Any]) -> None:
    made = convert("verl", *words.split())
    assert {key: made.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            f"{VERL_FILTER}enable=True actor_rollout_ref.rollout.n=8",
            {"filter.enabled": True, "filter.metric": "acc"},
        ),
        (
            f"{ACTOR}tis_imp_ratio_cap=2",
            {"loss.anchor": "proximal", "loss.correction": "token"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_key_of_siirl_is_our_key(words: str, expected: dict[str, Any]) -> None:
    made = convert("siirl", *words.split())
    assert {key: made.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("word", "off", "said"),
    [
        (f"{ROLLOUT}top_p=0.9", f"{ROLLOUT}top_p=1.0", "the whole distribution"),
        (f"{ROLLOUT}top_k=50", f"{ROLLOUT}top_k=-1", "the whole distribution"),
        (f"{MODEL}lora_rank=32", f"{MODEL}lora_rank=0", "full training here"),
        (f"{ACTOR}policy_loss.loss_mode=clip_cov", f"{ACTOR}policy_loss.loss_mode=geo_mean", "no such loss here"),
        (f"{CORRECTION}rollout_rs=token_k1", f"{CORRECTION}rollout_rs=null", "no such rejection here"),
        (f"{CORRECTION}loss_type=reinforce", f"{CORRECTION}loss_type=ppo_clip", "REINFORCE there"),
        (f"{ACTOR}optim.lr_warmup_steps_ratio=0.1", f"{ACTOR}optim.lr_warmup_steps_ratio=0", "number isn't known"),
        (f"{ACTOR}optim.warmup_style=cosine", f"{ACTOR}optim.warmup_style=constant", "constant after warm-up"),
        ("data.train_max_samples=1000", "data.train_max_samples=-1", "only that many rows"),
        (f"{ROLLOUT}multi_turn.enable=True", f"{ROLLOUT}multi_turn.enable=False", "YOUR AGENT LOOP tool_agent"),
        ("algorithm.use_kl_in_reward=True", "algorithm.use_kl_in_reward=False", "loss.kl_coef"),
        ("data.truncation=left", "data.truncation=error", "longer prompts are cut there"),
    ],
)
def test_what_trains_something_else_is_said_at_the_top(word: str, off: str, said: str) -> None:
    loud = converted("verl", [*VERL, DATA, word])[1].loud
    assert [said in line for line in loud if line.startswith(word.partition("=")[0])] == [True]
    assert not any(said in line for line in converted("verl", [*VERL, DATA, off])[1].loud)


def test_a_verdict_that_is_a_guess_is_said_first() -> None:
    loud = converted("verl", [*VERL, "data.train_files=mine.parquet"])[1].loud
    assert "reward.verifier=dapo for all rows is a guess" in loud[0]
    assert not any("guess" in line for line in converted("verl", [*VERL, DATA])[1].loud)


def test_data_sets_with_verdicts_of_their_own_are_said_to_share_one() -> None:
    loud = converted("verl", [*VERL, "data.train_files=[/d/gsm8k/train.parquet,/d/math/train.parquet]"])[1].loud
    assert "drawn from equally here, row after row there" in " ".join(loud)
    assert "reward.verifier=gsm8k for all rows is a guess" in " ".join(loud)


def test_what_is_said_of_it_does_not_contradict_the_config() -> None:
    """An asynchronous trainer doesn't sample and train in turn, and its ratio is against the sampler's log-probs."""
    asynchronous = "async_training.staleness_threshold=0.5 async_training.trigger_parameter_sync_step=4".split()
    assert any("in turn" in line for line in converted("verl", [*VERL, DATA])[1].loud)
    text = converted("verl", [*VERL, DATA, *asynchronous])[0]
    for words in ("in turn", "Its ratio", "Groups beyond a batch", "evaluates every row"):
        assert words not in text
