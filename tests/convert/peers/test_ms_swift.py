"""ms-swift's arguments: what becomes of each, and what is said of those that train something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncdapo.convert.command import converted
from tests.convert.test_convert import convert


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--enable_thinking false", {"prompts.chat_template": {"enable_thinking": False}}),
        (
            "--global_batch_size 16 --generation_batch_size 64 --num_generations 8",
            {"replay.prompts_per_step": 8, "learner.updates_per_step": 4},
        ),
        (
            "--warmup_steps 0.1 --max_steps 200",
            {"learner.warmup_steps": 20},
        ),
        (
            "--reward_funcs accuracy --reward_weights 0.5 1 --reward_model a/b",
            {"reward.correct": 0.5},
        ),
        (
            "--epsilon 0.1 --epsilon_high 0.3",
            {"loss.clip_low": 0.1, "loss.clip_high": 0.3},
        ),
        (
            "--epsilon 0.1",
            {"loss.clip_low": 0.1, "loss.clip_high": 0.1, "loss.kl_coef": 0.04},
        ),
        (
            "--dynamic_sample true --max_resample_times 5",
            {"filter.enabled": True, "filter.max_gen_batches": 6, "filter.on_limit": "unfiltered"},
        ),
        (
            "--dynamic_sample",
            {"filter.max_gen_batches": 4, "filter.metric": "seq_reward"},
        ),
        (
            "--loss_type grpo",
            {"loss.agg": "seq-mean-token-mean"},
        ),
        (
            "--loss_type bnpo",
            {"loss.agg": "token-mean"},
        ),
        (
            "--loss_type=dapo",
            {"loss.agg": "token-mean"},
        ),
        (
            "--loss_type dr_grpo",
            {"loss.agg": "seq-mean-token-sum-norm"},
        ),
        (
            "--loss_type cispo --epsilon_high 5",
            {"loss.variant": "cispo", "loss.clip_low": 1.0, "loss.clip_high": 4.0},
        ),
        (
            "--overlong_filter true",
            {"reward.overlong_filter": True},
        ),
        (
            "--reward_funcs accuracy soft_overlong --soft_cache_length 64 --soft_max_length 500 "
            "--max_completion_length 500",
            {"reward.overlong_buffer": 64, "reward.overlong_penalty": 1.0, "reward.verifier": "math_verify"},
        ),
        (
            "--reward_funcs soft_overlong --soft_cache_length 64 --soft_max_length 448 --max_completion_length 512",
            {"reward.overlong_buffer": 128, "reward.overlong_penalty": 2.0},
        ),
        (
            "--soft_cache_length 64 --temperature 0.7",
            {"rollout.temperature": 0.7},
        ),
        (
            "--gradient_checkpointing true",
            {"learner.activation_checkpointing": "full"},
        ),
        (
            "--gradient_checkpointing false",
            {"learner.activation_checkpointing": "none"},
        ),
        ("--per_device_train_batch_size 4", {"replay.prompts_per_step": 2, "learner.updates_per_step": 1}),
        ("--vllm_max_model_len 4096 --max_completion_length 1024", {"prompts.max_prompt_length": 3072}),
        ("--max_length 777 --vllm_max_model_len 4096", {"prompts.max_prompt_length": 777}),
        (
            "--dataset a/b:main#1000 --num_train_epochs 2 --generation_batch_size 80 --num_generations 8",
            {"prompts.path": "data/b/train.parquet", "run.steps": 200, "prompts.epochs": 2},
        ),
        (
            "--dataset a/b#800 --num_train_epochs 1 --generation_batch_size 80 --num_generations 8 --warmup_ratio 0.05",
            {"run.steps": 80, "learner.warmup_steps": 20},
        ),
        (
            "--loss_type sapo --tau_pos 1.2",
            {"loss.variant": "sapo", "loss.sapo_tau": [1.2, 1.05], "loss.clip_low": None},
        ),
        ("--scale_rewards batch", {"loss.advantage": "grpo_batch_std"}),
        ("--global_batch_size 16 --lr_decay_style cosine --clip_grad 0.5", {"learner.grad_clip": 0.5}),
        ("--dataset a/b", {"eval.num_prompts": 0, "eval.num_greedy_prompts": 0}),
        (
            "--dataset a/b --val_dataset gsm8k#100",
            {"eval.num_prompts": 100, "prompts.eval_path": "data/gsm8k/test.parquet"},
        ),
        ("--dataset a/b --val_dataset gsm8k", {"eval.num_prompts": 1319}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_key_of_theirs_is_our_key(words: str, expected: dict[str, Any]) -> None:
    made = convert("ms-swift", *words.split())
    assert {key: made.get(key) for key in expected} == expected


FULL = "--dataset a/b --tuner_type full --lr_scheduler_type constant --max_length 512 --reward_funcs accuracy".split()


def test_a_system_prompt_that_names_a_file_is_the_text_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "examples" / "train"
    folder.mkdir(parents=True)
    (tmp_path / "examples" / "system.txt").write_text("Think first.\nThen answer.")
    script = folder / "run.sh"
    script.write_text("swift rlhf --rlhf_type grpo --system examples/system.txt --dataset a/b\n")
    assert convert("ms-swift", str(script))["prompts.system_prompt"] == "Think first.\nThen answer."
    monkeypatch.chdir(tmp_path)
    assert convert("ms-swift", "--system", "examples/system.txt")["prompts.system_prompt"].startswith("Think first.")
    (tmp_path / "examples" / "system.txt").unlink()
    made = converted("ms-swift", [str(script)])[1]
    assert (
        "system=examples/system.txt: no such file here; our own default is used for prompts.system_prompt" in made.loud
    )
    assert "prompts.system_prompt" not in made.values


def test_a_system_prompt_of_its_own_words_is_kept() -> None:
    assert convert("ms-swift", "--system", "Be brief.\\nBe right.")["prompts.system_prompt"] == "Be brief.\nBe right."


@pytest.mark.parametrize(
    ("words", "off", "said"),
    [
        ("--tuner_type lora", "--tuner_type full", "full training here"),
        ("--train_type lora", "--train_type full", "full training here"),
        ("--loss_type real", "--loss_type sapo", "no such loss here"),
        ("--chord_sft_dataset c/d", "--log_completions true", "CHORD's supervised loss"),
        ("--top_p 0.9", "--top_p 1.0", "the whole distribution"),
        ("--top_k 50", "--top_k -1", "the whole distribution"),
        ("--warmup_ratio 0.05", "--warmup_steps 10", "a share of the steps"),
        ("--lr_scheduler_type cosine", "--lr_scheduler_type constant", "constant after warm-up"),
        ("--dataset a/b#1000", "--dataset a/b", "only that many rows"),
        ("--scale_rewards gdpo", "--scale_rewards batch", "scaled over the batch there"),
        ("--reward_funcs accuracy format", "--reward_funcs accuracy", "only accuracy counts here"),
    ],
)
def test_what_trains_something_else_is_said_at_the_top(words: str, off: str, said: str) -> None:
    assert said in " ".join(converted("ms-swift", [*FULL, *words.split()])[1].loud)
    assert said not in " ".join(converted("ms-swift", [*FULL, *off.split()])[1].loud)


def test_lora_and_a_cosine_are_said_where_the_script_leaves_them_to_the_defaults() -> None:
    loud = " ".join(converted("ms-swift", ["--dataset", "a/b"])[1].loud)
    assert "(their default is LoRA)" in loud
    assert "lr_scheduler_type=cosine (ms-swift's default)" in loud
    assert "prompts.max_prompt_length=1024: theirs is the model's limit" in loud


def test_their_megatron_trainer_trains_all_weights_unless_told_otherwise() -> None:
    megatron = ["--dataset", "a/b", "--global_batch_size", "16"]
    assert "LoRA" not in " ".join(converted("ms-swift", megatron)[1].loud)
    assert "LoRA" in " ".join(converted("ms-swift", [*megatron, "--tuner_type", "lora"])[1].loud)


def test_a_filter_that_is_off_is_not_spoken_of() -> None:
    assert "resampling" not in converted("ms-swift", ["--dataset", "a/b"])[0]
    assert "resampling" in converted("ms-swift", ["--dataset", "a/b", "--dynamic_sample", "true"])[0]


@pytest.mark.parametrize(("new", "length"), [(512, 300), (700, 700), (1000, 64)])
def test_a_punishment_with_another_limit_is_the_same_at_every_length(new: int, length: int) -> None:
    """ms-swift's soft_overlong before soft_max_length, and ours before rollout.max_response_length."""
    words = f"--reward_funcs soft_overlong --soft_cache_length 100 --soft_max_length 512 --max_completion_length {new}"
    made = convert("ms-swift", *words.split())
    theirs = min(-(length - 412) / 100, 0)
    buffer = made["reward.overlong_buffer"]
    ours = -made["reward.overlong_penalty"] * max(0, length - (new - buffer)) / buffer
    assert ours == pytest.approx(theirs)
