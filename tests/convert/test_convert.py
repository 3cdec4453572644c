"""The five peers' documented DAPO snippets, every key that they have for it, and what is done with all others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from asyncdapo.cli import main
from asyncdapo.convert.command import PEERS, converted
from asyncdapo.convert.settings import read_settings
from asyncdapo.errors import UserError

HERE = Path(__file__).parent
SNIPPETS = sorted(path for path in (HERE / "snippets").iterdir() if path.stem in PEERS)
ACTOR = "actor_rollout_ref.actor."
VERL_FILTER = "algorithm.filter_groups."
DYNAMIC = "trainer.algorithm.dynamic_sampling."


def convert(peer: str, *words: str) -> dict[str, Any]:
    """Our keys, dotted, as a run's loader reads them."""
    tree = OmegaConf.to_container(OmegaConf.create(converted(peer, list(words))[0]))
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda path: path.stem)
def test_a_documented_snippet_becomes_the_expected_config(snippet: Path) -> None:
    expected = yaml.safe_load((HERE / "expected" / f"{snippet.stem}.yaml").read_text())
    made = OmegaConf.to_container(OmegaConf.create(converted(snippet.stem, [str(snippet)])[0]))
    expected = OmegaConf.to_container(OmegaConf.create(expected))
    assert set(made) == set(expected)
    for section, keys in expected.items():
        assert made[section] == keys, section


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda path: path.stem)
def test_every_key_of_a_snippet_is_named_in_what_comes_out(snippet: Path) -> None:
    text = converted(snippet.stem, [str(snippet)])[0]
    given_keys = read_settings([str(snippet)], flags=PEERS[snippet.stem].flags).table
    assert len(given_keys) > 20
    assert [key for key, value in given_keys.items() if f"{key}=" not in text and not value.inherited] == []


@pytest.mark.parametrize(
    ("peer", "words", "expected"),
    [
        (
            "verl",
            f"{ACTOR}clip_ratio_low=0.1 {ACTOR}clip_ratio_high=0.3",
            {"loss.clip_low": 0.1, "loss.clip_high": 0.3},
        ),
        ("verl", f"{ACTOR}clip_ratio_c=5", {"loss.dual_clip": 5}),
        ("verl", f"{ACTOR}lr=1", {"loss.dual_clip": 3.0, "loss.clip_high": 0.2, "filter.enabled": False}),
        ("verl", f"{ACTOR}loss_agg_mode=seq-mean-token-sum", {"loss.agg": "seq-mean-token-sum"}),
        ("verl", f"{ACTOR}use_token_level_loss=False", {"loss.agg": "seq-mean-token-mean"}),
        ("verl", f"{ACTOR}use_token_level_loss=True", {"loss.agg": "token-mean"}),
        (
            "verl",
            f"data.gen_batch_size=96 data.train_batch_size=32 {VERL_FILTER}enable=True actor_rollout_ref.rollout.n=4",
            {"filter.gen_batch_multiplier": 3, "replay.prompts_per_step": 32},
        ),
        (
            "verl",
            f"data.gen_batch_size=80 data.train_batch_size=32 {VERL_FILTER}enable=True actor_rollout_ref.rollout.n=4",
            {"filter.gen_batch_multiplier": 3},
        ),
        ("verl", "data.gen_batch_size=96 data.train_batch_size=32", {"replay.prompts_per_step": 96}),
        ("verl", "actor_rollout_ref.rollout.n=4", {"rollout.group_size": 4}),
        (
            "verl",
            f"{VERL_FILTER}enable=True {VERL_FILTER}metric=seq_final_reward {VERL_FILTER}max_num_gen_batches=-1 "
            "actor_rollout_ref.rollout.n=4",
            {"filter.enabled": True, "filter.metric": "seq_final_reward", "filter.max_gen_batches": 0},
        ),
        (
            "verl",
            "reward_model.overlong_buffer.enable=True reward_model.overlong_buffer.len=64 "
            "reward_model.overlong_buffer.penalty_factor=0.5",
            {"reward.overlong_buffer": 64, "reward.overlong_penalty": 0.5},
        ),
        (
            "verl",
            "+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True "
            "+reward_model.reward_kwargs.overlong_buffer_cfg.len=64",
            {"reward.overlong_buffer": 64},
        ),
        (
            "verl",
            "reward_model.overlong_buffer.enable=False reward_model.overlong_buffer.len=64",
            {"reward.overlong_buffer": 0},
        ),
        (
            "verl",
            "data.max_prompt_length=100 data.max_response_length=200",
            {"prompts.max_prompt_length": 100, "rollout.max_response_length": 200},
        ),
        (
            "verl",
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
        ("verl", f"{ACTOR}use_kl_loss=False {ACTOR}kl_loss_coef=0.01", {"loss.kl_coef": 0.0}),
        (
            "verl",
            f"{ACTOR}use_kl_loss=True {ACTOR}kl_loss_coef=0.01 {ACTOR}kl_loss_type=mse",
            {"loss.kl_coef": 0.01, "loss.kl_estimator": "k2"},
        ),
        ("verl", f"{ACTOR}policy_loss.loss_mode=gspo", {"loss.variant": "gspo", "loss.agg": "seq-mean-token-mean"}),
        (
            "verl",
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
            "verl",
            "async_training.trigger_parameter_sync_step=4 async_training.require_batches=2 "
            f"{ACTOR}ppo_mini_batch_size=8 {ACTOR}optim.lr_warmup_steps=5 trainer.test_freq=3 rollout.test_freq=7 "
            "trainer.total_epochs=2 rollout.total_epochs=9 data.train_files=a.parquet",
            {"learner.warmup_steps": 10, "eval.every": 7, "prompts.epochs": 2},
        ),
        ("verl", "trainer.experiment_name=007", {"run.name": "007"}),
        ("verl", "trainer.experiment_name=12 data.max_prompt_length=12", {"run.name": "12"}),
        ("verl", "data.val_files=a.parquet", {"prompts.eval_path": None, "prompts.task": None}),
        (
            "skyrl",
            "generator.inference_engine.gpu_memory_utilization=0.7",
            {"rollout.engine": "vllm", "rollout.memory_fraction": 0.7},
        ),
        (
            "nemo-rl",
            "grpo.num_prompts_per_step=8 grpo.num_generations_per_prompt=16 policy.train_global_batch_size=8",
            {"replay.prompts_per_step": 8, "learner.updates_per_step": 8},
        ),
        (
            "nemo-rl",
            "grpo.num_prompts_per_step=8 grpo.num_generations_per_prompt=16 "
            "policy.train_global_batch_size=${mul:${grpo.num_prompts_per_step},4}",
            {"learner.updates_per_step": 4},
        ),
        (
            "ms-swift",
            "--global_batch_size 16 --generation_batch_size 64 --num_generations 8",
            {"replay.prompts_per_step": 8, "learner.updates_per_step": 4},
        ),
        ("ms-swift", "--warmup_steps 0.1 --max_steps 200", {"learner.warmup_steps": 20}),
        ("ms-swift", "--reward_funcs accuracy --reward_weights 0.5 1 --reward_model a/b", {"reward.correct": 0.5}),
        (
            "siirl",
            f"{VERL_FILTER}enable=True actor_rollout_ref.rollout.n=8",
            {"filter.enabled": True, "filter.metric": "acc"},
        ),
        ("siirl", f"{ACTOR}tis_imp_ratio_cap=2", {"loss.anchor": "proximal", "loss.correction": "token"}),
        (
            "skyrl",
            "trainer.algorithm.eps_clip_low=0.1 trainer.algorithm.eps_clip_high=0.3",
            {"loss.clip_low": 0.1, "loss.clip_high": 0.3},
        ),
        (
            "skyrl",
            f"{DYNAMIC}type=filter {DYNAMIC}max_sample_batches=7",
            {"filter.enabled": True, "filter.max_gen_batches": 7},
        ),
        ("skyrl", f"{DYNAMIC}type=filter {DYNAMIC}max_sample_batches=-1", {"filter.max_gen_batches": 0}),
        ("skyrl", f"{DYNAMIC}type=replace", {"filter.enabled": True, "filter.mode": "replace"}),
        ("skyrl", f"{DYNAMIC}type=null", {"filter.enabled": False}),
        ("skyrl", "trainer.algorithm.loss_reduction=token_mean_legacy", {"loss.agg": "token-mean"}),
        ("skyrl", "trainer.algorithm.loss_reduction=sequence_mean", {"loss.agg": "seq-mean-token-mean"}),
        ("skyrl", "trainer.algorithm.loss_reduction=prompt_mean", {"loss.agg": "prompt-mean"}),
        ("skyrl", "generator.apply_overlong_filtering=true", {"reward.overlong_filter": True, "loss.kl_coef": 0.001}),
        (
            "skyrl",
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
            "skyrl",
            "trainer.fully_async.enabled=true trainer.fully_async.max_staleness_steps=3 "
            "trainer.policy_mini_batch_size=32",
            {"replay.max_staleness": 3, "replay.run_ahead": 3.0, "replay.prompts_per_step": 32},
        ),
        ("nemo-rl", "grpo.use_dynamic_sampling=true", {"filter.enabled": True, "filter.max_gen_batches": 11}),
        (
            "nemo-rl",
            "grpo.num_prompts_per_step=64 grpo.num_generations_per_prompt=8 policy.train_global_batch_size=128",
            {"replay.prompts_per_step": 64, "rollout.group_size": 8, "learner.updates_per_step": 4},
        ),
        (
            "nemo-rl",
            "grpo.use_dynamic_sampling=true grpo.dapo_batch_multiplier=2.5 grpo.max_num_gen_batches=4",
            {"filter.gen_batch_multiplier": 3, "filter.max_gen_batches": 5},
        ),
        (
            "nemo-rl",
            "grpo.reward_scaling.enabled=true grpo.reward_scaling.target_min=-2 grpo.reward_scaling.target_max=3",
            {"reward.correct": 3.0, "reward.incorrect": -2.0},
        ),
        (
            "nemo-rl",
            "grpo.reward_scaling.enabled=true grpo.reward_scaling.source_max=2 grpo.reward_scaling.target_max=10",
            {"reward.correct": 5.0, "reward.incorrect": 0.0},
        ),
        (
            "nemo-rl",
            "grpo.reward_shaping.enabled=true grpo.reward_shaping.overlong_buffer_length=100 "
            "grpo.reward_shaping.overlong_buffer_penalty=0.5 grpo.reward_shaping.max_response_length=800 "
            "policy.generation.max_new_tokens=800 policy.max_total_sequence_length=1000",
            {"reward.overlong_buffer": 100, "reward.overlong_penalty": 0.5, "rollout.max_response_length": 800},
        ),
        (
            "nemo-rl",
            "grpo.reward_shaping.enabled=true grpo.reward_shaping.overlong_buffer_length=100 "
            "grpo.reward_shaping.max_response_length=800 policy.generation.max_new_tokens=900",
            {"reward.overlong_buffer": 200, "reward.overlong_penalty": 2.0},
        ),
        ("ms-swift", "--epsilon 0.1 --epsilon_high 0.3", {"loss.clip_low": 0.1, "loss.clip_high": 0.3}),
        ("ms-swift", "--epsilon 0.1", {"loss.clip_low": 0.1, "loss.clip_high": 0.1, "loss.kl_coef": 0.04}),
        (
            "ms-swift",
            "--dynamic_sample true --max_resample_times 5",
            {"filter.enabled": True, "filter.max_gen_batches": 6, "filter.on_limit": "unfiltered"},
        ),
        ("ms-swift", "--dynamic_sample", {"filter.max_gen_batches": 4, "filter.metric": "seq_reward"}),
        ("ms-swift", "--loss_type grpo", {"loss.agg": "seq-mean-token-mean"}),
        ("ms-swift", "--loss_type bnpo", {"loss.agg": "token-mean"}),
        ("ms-swift", "--loss_type=dapo", {"loss.agg": "token-mean"}),
        ("ms-swift", "--loss_type dr_grpo", {"loss.agg": "seq-mean-token-sum-norm"}),
        (
            "ms-swift",
            "--loss_type cispo --epsilon_high 5",
            {"loss.variant": "cispo", "loss.clip_low": 1.0, "loss.clip_high": 4.0},
        ),
        ("ms-swift", "--overlong_filter true", {"reward.overlong_filter": True}),
        (
            "ms-swift",
            "--reward_funcs accuracy soft_overlong --soft_cache_length 64 --soft_max_length 500 "
            "--max_completion_length 500",
            {"reward.overlong_buffer": 64, "reward.overlong_penalty": 1.0, "reward.verifier": "math_verify"},
        ),
        (
            "ms-swift",
            "--reward_funcs soft_overlong --soft_cache_length 64 --soft_max_length 448 --max_completion_length 512",
            {"reward.overlong_buffer": 128, "reward.overlong_penalty": 2.0},
        ),
        ("ms-swift", "--soft_cache_length 64 --temperature 0.7", {"rollout.temperature": 0.7}),
        (
            "verl",
            "actor_rollout_ref.model.enable_gradient_checkpointing=True",
            {"learner.activation_checkpointing": "full"},
        ),
        ("skyrl", "trainer.gradient_checkpointing=true", {"learner.activation_checkpointing": "full"}),
        ("nemo-rl", "policy.dtensor_cfg.activation_checkpointing=true", {"learner.activation_checkpointing": "full"}),
        ("ms-swift", "--gradient_checkpointing true", {"learner.activation_checkpointing": "full"}),
        ("ms-swift", "--gradient_checkpointing false", {"learner.activation_checkpointing": "none"}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_key_of_theirs_is_our_key(peer: str, words: str, expected: dict[str, Any]) -> None:
    made = convert(peer, *words.split())
    assert {key: made.get(key) for key in expected} == expected


@pytest.mark.parametrize(("new", "length"), [(512, 300), (700, 700), (1000, 64)])
def test_a_punishment_with_another_limit_is_the_same_at_every_length(new: int, length: int) -> None:
    """ms-swift's soft_overlong before soft_max_length, and ours before rollout.max_response_length."""
    words = f"--reward_funcs soft_overlong --soft_cache_length 100 --soft_max_length 512 --max_completion_length {new}"
    made = convert("ms-swift", *words.split())
    theirs = min(-(length - 412) / 100, 0)
    buffer = made["reward.overlong_buffer"]
    ours = -made["reward.overlong_penalty"] * max(0, length - (new - buffer)) / buffer
    assert ours == pytest.approx(theirs)


KEYS = {
    peer: sorted({key for rule in PEERS[peer].rules for key in rule.theirs if key and not key.isupper()})
    for peer in PEERS
}


@settings(max_examples=30, deadline=None)
@given(data=st.data(), peer=st.sampled_from(sorted(PEERS)))
def test_no_key_is_dropped_in_silence(data: st.DataObject, peer: str) -> None:
    keys = data.draw(st.lists(st.sampled_from([*KEYS[peer], "made_up", "also.made.up"]), min_size=1, unique=True))
    values = [data.draw(st.sampled_from(["1", "true", "null", "grpo", "0.5"])) for _ in keys]
    flags = PEERS[peer].flags
    keys = [key.replace(".", "_") for key in keys] if flags else keys
    pairs = list(zip(keys, values, strict=True))
    words = [part for key, value in pairs for part in ((f"--{key}", value) if flags else (f"{key}={value}",))]
    try:
        text, _ = converted(peer, words)
    except UserError:  # a value that makes no sense
        return
    assert [key for key in keys if f"{key}=" not in text] == []


VERL = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4")
"""Without which verl trains a critic on single completions."""


def test_a_key_nobody_knows_is_listed_as_unknown() -> None:
    text, made = converted("verl", [*VERL, "data.train_files=a.parquet", "actor_rollout_ref.made_up=3"])
    assert len(made.left) == 1
    assert "unknown: no key of verl" in text
    assert "actor_rollout_ref.made_up=3" in text


def test_a_value_that_needs_a_shell_is_listed_with_the_reason(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text('name="run-$(date +%F)"\npython -m a.b data.train_batch_size=8 trainer.experiment_name=$name\n')
    text, made = converted("verl", [str(script), *VERL, "data.train_files=a.parquet"])
    assert len(made.left) == 1
    assert "no command is run" in text
    assert "replay" in text


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ("verl", "trainer.n_gpus_per_node=8 actor_rollout_ref.rollout.tensor_model_parallel_size={}"),
        (
            "skyrl",
            "trainer.placement.policy_num_gpus_per_node=8 generator.inference_engine.num_engines=4 "
            "generator.inference_engine.tensor_parallel_size={}",
        ),
        ("nemo-rl", "cluster.gpus_per_node=8 policy.generation.vllm_cfg.tensor_parallel_size={}"),
        ("ms-swift", "--use_vllm true --vllm_mode colocate --vllm_tensor_parallel_size {} --generation_batch_size 64"),
    ],
)
@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_workers_and_ranks_take_no_more_gpus_than_there_are(
    tmp_path: Path, peer: str, words: str, parallel: int
) -> None:
    if PEERS[peer].flags:  # its GPUs stand in front of the command
        script = tmp_path / "train.sh"
        script.write_text(f"NPROC_PER_NODE=8 swift rlhf {words.format(parallel)}\n")
        made = convert(peer, str(script))
    else:
        made = convert(peer, *words.format(parallel).split())
    engines = made["rollout.num_workers"] * parallel
    assert made["controller.placement"] == ("shared" if parallel == 1 else "separate")
    assert max(engines, made["learner.ranks"]) <= 8 if parallel == 1 else engines + made["learner.ranks"] <= 8


def test_what_a_script_exports_counts_as_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(
        "NNODES=9\nexport NPROC_PER_NODE=4\nswift rlhf --rlhf_type grpo --per_device_train_batch_size 4\n"
    )
    assert convert("ms-swift", str(script))["replay.prompts_per_step"] == 2


def test_a_script_that_starts_another_is_refused_with_its_name(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text('bash examples/run.sh trainer.epochs=3 "$@"\n')
    with pytest.raises(UserError, match="it starts examples/run.sh: convert that"):
        converted("skyrl", [str(script)])


def test_arguments_behind_a_script_win_over_it() -> None:
    made = convert("verl", str(HERE / "snippets" / "verl.sh"), "data.max_prompt_length=77")
    assert made["prompts.max_prompt_length"] == 77


def test_a_recipe_is_read_over_the_file_it_builds_on_and_does_without() -> None:
    made = convert("nemo-rl", str(HERE / "snippets" / "nemo-rl.yaml"))
    assert made["run.seed"] == 7
    assert made["rollout.group_size"] == 16


@pytest.mark.parametrize("name", ["a\nrun: {seed: 7}", "1e-6", "yes", "a: b # c", "'", '"', "*x", "é\tx"])
def test_a_text_comes_out_as_it_went_in(name: str) -> None:
    text, _ = converted(
        "verl", [f"trainer.default_local_dir=x{name}", f"data.train_files=[{'d/' + name!r}, b.parquet]"]
    )
    run = yaml.safe_load(text)["run"]
    assert run["dir"] == f"x{name}"
    assert "seed" not in run


def test_a_long_argument_is_no_file() -> None:
    assert convert("verl", f"trainer.experiment_name={'x' * 5000}")["run.name"] == "x" * 5000
    assert convert("verl", "trainer.experiment_name=a.yaml")["run.name"] == "a.yaml"


def test_a_value_we_refuse_names_their_key() -> None:
    with pytest.raises(UserError, match=r"loss.clip_low.*got 7.*actor_rollout_ref.actor.clip_ratio_low=7"):
        converted("verl", [f"{ACTOR}clip_ratio_low=7"])
    with pytest.raises(UserError, match=r"data.train_batch_size=many.*replay.prompts_per_step"):
        converted("verl", ["data.train_batch_size=many"])


def test_yaml_that_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    levels = "\n".join(f"k{level}: &k{level} {{a: *k{level - 1}, b: *k{level - 1}}}" for level in range(1, 18))
    path = tmp_path / "bomb.yaml"
    path.write_text(f"k0: &k0 {{a: 1, b: 2}}\n{levels}\n")
    with pytest.raises(UserError, match="more than|too deeply"):
        converted("nemo-rl", [str(path)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.sh"], "missing.sh: no such file"),
        ([], "nothing to convert"),
        (["[1"], "data.train_batch_size"),
    ],
)
def test_what_cannot_be_read_is_said(words: list[str], said: str) -> None:
    words = words if words != ["[1"] else ["data.train_batch_size=[1"]
    with pytest.raises(UserError, match=re.escape(said)):
        converted("verl", words)


def test_the_command_takes_a_file_or_arguments_and_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = " ".join([*VERL, "data.train_files=a.parquet", "data.train_batch_size=8", "some.thing=1"])
    Path("train.sh").write_text(f"touch run\npython3 -m verl.main {words}\n")
    assert main(["convert", "--from", "verl", "train.sh", "--out", "x.yaml"]) == 0
    assert "1 key without a line" in capsys.readouterr().err
    assert "prompts_per_step: 8" in Path("x.yaml").read_text()
    assert not Path("run").exists()
    assert main("convert --from ms-swift --epsilon 0.2 --epsilon_high 0.28".split()) == 0
    assert "clip_high: 0.28" in capsys.readouterr().out
    assert main("convert --from ms-swift -- --epsilon 0.3".split()) == 0
    assert "clip_low: 0.3" in capsys.readouterr().out
    assert main("convert --from verl --out missing/x.yaml data.train_batch_size=8".split()) == 2
    assert "missing/x.yaml: No such file" in capsys.readouterr().err
    assert main("convert --from verl".split()) == 2


def test_a_key_that_is_given_twice_counts_last_and_the_first_is_noted(tmp_path: Path) -> None:
    text = converted("verl", ["data.train_batch_size=512", "data.train_batch_size=256"])[0]
    assert "data.train_batch_size=512: given again behind it, not read" in text
    text = converted("ms-swift", ["--beta", "0.1", "--beta", "0.2"])[0]
    assert "beta=0.1: given again behind it, not read" in text
    path = tmp_path / "two.yaml"
    path.write_text("data:\n  train_batch_size: 512\n  train_batch_size: 256\n")
    text = converted("verl", [str(path)])[0]
    assert "two.yaml, line 2: train_batch_size=512: given again behind it, not read" in text


def test_of_two_spellings_of_one_key_the_one_that_is_not_taken_is_noted() -> None:
    text = converted("nemo-rl", ["grpo.dapo_batch_multiplier=2", "grpo.batch_multiplier=3"])[0]
    assert "grpo.dapo_batch_multiplier=2: the same as grpo.batch_multiplier" in text


def test_hydras_mappings_need_no_blank_behind_a_colon() -> None:
    table = read_settings(["a={b:1,c:{d:x},e:http://host:8/f}"], flags=False).table
    assert {key: setting.value for key, setting in table.items()} == {"a.b": 1, "a.c.d": "x", "a.e": "http://host:8/f"}


def test_the_name_of_a_data_file_stays_in_its_comment(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(r'data: {train_files: "x\nmetrics:\n  wandb: online\n  wandb_project: /a.parquet"}')
    assert not any(key.startswith("metrics.") for key in convert("verl", str(path)))


def test_lists_that_unfold_without_end_are_shown_short(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text("a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)))
    assert "a29=[[[" in converted("verl", [str(path)])[0]


def test_arguments_of_other_commands_are_noted(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    lines = [
        "python -m verl.main data.train_batch_size=8 trainer.x=1 \\",
        "    # data.gen_batch_size=16 \\",
        "    trainer.after=1",
        "python -m verl.main trainer.y=1",
    ]
    script.write_text("\n".join(lines))
    text = converted("verl", [str(script)])[0]
    assert "line 3: trainer.after=1: stands behind the end of a command" in text
    assert "line 4: another command with arguments, not converted" in text
