"""NeMo RL's keys: what becomes of each, of the files that a recipe builds on, and of what trains something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncdapo.convert.command import converted
from tests.convert.test_convert import convert


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "policy.tokenizer.chat_template_kwargs.enable_thinking=false",
            {"prompts.chat_template": {"enable_thinking": False}},
        ),
        ("loss_fn.ratio_clip_max=0.28", {"loss.dual_clip": None}),
        (
            "grpo.num_prompts_per_step=8 grpo.num_generations_per_prompt=16 policy.train_global_batch_size=8",
            {"replay.prompts_per_step": 8, "learner.updates_per_step": 8},
        ),
        (
            "grpo.num_prompts_per_step=8 grpo.num_generations_per_prompt=16 "
            "policy.train_global_batch_size=${mul:${grpo.num_prompts_per_step},4}",
            {"learner.updates_per_step": 4},
        ),
        (
            "grpo.use_dynamic_sampling=true",
            {"filter.enabled": True, "filter.max_gen_batches": 11},
        ),
        (
            "grpo.num_prompts_per_step=64 grpo.num_generations_per_prompt=8 policy.train_global_batch_size=128",
            {"replay.prompts_per_step": 64, "rollout.group_size": 8, "learner.updates_per_step": 4},
        ),
        (
            "grpo.use_dynamic_sampling=true grpo.dapo_batch_multiplier=2.5 grpo.max_num_gen_batches=4",
            {"filter.gen_batch_multiplier": 3, "filter.max_gen_batches": 5},
        ),
        (
            "grpo.reward_scaling.enabled=true grpo.reward_scaling.target_min=-2 grpo.reward_scaling.target_max=3",
            {"reward.correct": 3.0, "reward.incorrect": -2.0},
        ),
        (
            "grpo.reward_scaling.enabled=true grpo.reward_scaling.source_max=2 grpo.reward_scaling.target_max=10",
            {"reward.correct": 5.0, "reward.incorrect": 0.0},
        ),
        (
            "grpo.reward_shaping.enabled=true grpo.reward_shaping.overlong_buffer_length=100 "
            "grpo.reward_shaping.overlong_buffer_penalty=0.5 grpo.reward_shaping.max_response_length=800 "
            "policy.generation.max_new_tokens=800 policy.max_total_sequence_length=1000",
            {"reward.overlong_buffer": 100, "reward.overlong_penalty": 0.5, "rollout.max_response_length": 800},
        ),
        (
            "grpo.reward_shaping.enabled=true grpo.reward_shaping.overlong_buffer_length=100 "
            "grpo.reward_shaping.max_response_length=800 policy.generation.max_new_tokens=900",
            {"reward.overlong_buffer": 200, "reward.overlong_penalty": 2.0},
        ),
        (
            "policy.dtensor_cfg.activation_checkpointing=true",
            {"learner.activation_checkpointing": "full"},
        ),
        ("ppo.max_num_epochs=-1", {"prompts.epochs": 0}),
        ("grpo.max_num_epochs=2", {"prompts.epochs": 2}),
        (
            "data.validation.dataset_name=DAPOMathAIME2024 grpo.max_val_samples=960",
            {"eval.num_prompts": 30, "eval.num_samples": 32},
        ),
        (
            "async_rl.sampler.name=windowed async_rl.sampler.max_staleness_versions=1",
            {"replay.run_ahead": 1.0, "replay.max_staleness": 1},
        ),
        ("ppo.ppo_epochs=4 ppo.num_prompts_per_step=8", {"learner.epochs": 4, "replay.prompts_per_step": 8}),
        ("ppo.reward_scaling.enabled=true ppo.reward_scaling.target_min=-1", {"reward.incorrect": -1.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_key_of_theirs_is_our_key(words: str, expected: dict[str, Any]) -> None:
    made = convert("nemo-rl", *words.split())
    assert {key: made.get(key) for key in expected} == expected


BASE = """
grpo: {normalize_rewards: true, use_leave_one_out_baseline: true}
data:
  train: {dataset_name: OpenMathInstruct-2}
  default: {prompt_file: prompts/question.txt, system_prompt_file: null, env_name: math}
"""
RECIPE = "defaults: ../base.yaml\npolicy: {model_name: a/b}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe and the files that it builds on, as they lie in a repository."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "prompts" / "question.txt").write_text("Think.\n{}\nAnswer in \\boxed{{}}.")
    (tmp_path / "base.yaml").write_text(BASE)
    path = tmp_path / "recipes" / "mine.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_has_the_data_template_and_advantage_of_the_file_it_builds_on(recipe: Path) -> None:
    made = convert("nemo-rl", str(recipe))
    assert made["prompts.task"] == "file"
    assert made["prompts.path"] == "data/OpenMathInstruct-2/train_1M.parquet"
    assert made["prompts.chat_template"] is True
    assert made["prompts.template"] == "Think.\n{prompt}\nAnswer in \\boxed{}."
    assert made["reward.verifier"] == "math_verify"
    text, said = converted("nemo-rl", [str(recipe)])
    assert "use_leave_one_out_baseline leaves a completion out" in " ".join(said.loud)
    assert "asyncdapo data prepare nvidia/OpenMathInstruct-2 --split train_1M" in text


def test_a_recipe_without_the_file_it_builds_on_says_so_first(recipe: Path) -> None:
    (recipe.parent.parent / "base.yaml").unlink()
    text, made = converted("nemo-rl", [str(recipe)])
    assert made.loud[0].startswith("defaults: ../base.yaml: no such file here")
    assert "task: file" in text


def test_a_template_that_is_not_here_is_said_aloud(recipe: Path) -> None:
    (recipe.parent.parent / "prompts" / "question.txt").unlink()
    loud = " ".join(converted("nemo-rl", [str(recipe)])[1].loud)
    assert "prompt_file=prompts/question.txt (base.yaml): no such file here" in loud


@pytest.mark.parametrize(
    ("word", "off", "said"),
    [
        ("policy.generation.top_p=0.9", "policy.generation.top_p=1.0", "the whole distribution"),
        (
            "policy.dtensor_cfg.lora_cfg.enabled=true",
            "policy.dtensor_cfg.lora_cfg.enabled=false",
            "full training",
        ),
        ("loss_fn.disable_ppo_ratio=true", "loss_fn.disable_ppo_ratio=false", "no loss without a ratio"),
        ("ppo.adv_estimator.name=gae", "ppo.adv_estimator.name=grpo", "there is no critic here"),
        ("data.default.env_name=code", "data.default.env_name=math", "YOUR ENVIRONMENT code"),
        (
            "grpo.reward_shaping.stop_properly_penalty_coef=0.0 grpo.reward_shaping.enabled=true",
            "grpo.reward_shaping.stop_properly_penalty_coef=null grpo.reward_shaping.enabled=true",
            "truncated response is multiplied by 0.0",
        ),
    ],
)
def test_what_trains_something_else_is_said_at_the_top(word: str, off: str, said: str) -> None:
    loud = converted("nemo-rl", word.split())[1].loud
    assert [said in line for line in loud if line.startswith(word.partition("=")[0])] == [True]
    assert not any(said in line for line in converted("nemo-rl", off.split())[1].loud)


def test_a_section_that_a_recipe_sets_to_null_is_gone(recipe: Path) -> None:
    base = recipe.parent.parent / "base.yaml"
    base.write_text("grpo:\n  async_grpo: {enabled: true, max_trajectory_age_steps: 3}\n")
    assert convert("nemo-rl", str(recipe))["replay.run_ahead"] == 3.0
    recipe.write_text(RECIPE + "grpo: {async_grpo: null}\n")
    assert "replay.run_ahead" not in convert("nemo-rl", str(recipe))
