"""The configs that come with the package: the paper's values, what variants differ in, and that all can be planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncdapo.config.config import SECTIONS, load_config, to_dict
from asyncdapo.config.found import config_dirs, find_config
from asyncdapo.controller.commands.plan import plan
from asyncdapo.errors import ConfigError

FOLDER = config_dirs()[-1]
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PAPER = "qwen2.5_32b_dapo"


def differences(name: str, other: str) -> dict[str, object]:
    """Keys in which `name` differs from `other`, with its own values."""
    mine, its = (to_dict(load_config(find_config(config))) for config in (name, other))
    return {
        f"{section}.{key}": value
        for section in SECTIONS
        for key, value in mine[section].items()
        if value != its[section][key]
    }


def test_the_full_recipe_has_the_papers_values() -> None:
    config = load_config(find_config(PAPER))
    assert (config.replay.prompts_per_step, config.rollout.group_size) == (512, 16)
    responses = config.replay.prompts_per_step * config.rollout.group_size
    assert responses // config.learner.updates_per_step == 512
    assert (config.learner.lr, config.learner.warmup_steps) == (1e-6, 20 * config.learner.updates_per_step)
    assert config.rollout.max_response_length == 16_384 + 4_096
    assert (config.reward.overlong_buffer, config.reward.overlong_penalty) == (4_096, 1.0)
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.agg) == (0.2, 0.28, "token-mean")
    assert config.loss.dual_clip == 10.0  # verl's clip_ratio_c
    assert (config.loss.variant, config.loss.advantage, config.loss.kl_coef) == ("ppo", "grpo", 0)
    assert (config.filter.enabled, config.filter.metric) == (True, "acc")
    assert (config.rollout.temperature, config.eval.temperature, config.eval.top_p) == (1.0, 1.0, 0.7)
    assert (config.eval.num_prompts, config.eval.num_samples) == (30, 32)
    assert (config.reward.verifier, config.reward.correct, config.reward.incorrect) == ("dapo", 1.0, -1.0)
    assert (config.learner.ranks, config.learner.num_shards, config.learner.offload) == (32, 32, "none")
    assert config.learner.tokens_per_microbatch == config.prompts.max_prompt_length + config.rollout.max_response_length
    assert config.rollout.num_workers * config.rollout.tensor_parallel + config.learner.ranks == 128


def test_the_variants_leave_out_what_their_names_say() -> None:
    off = {"filter.enabled": False, "filter.gen_batch_multiplier": 1, "filter.max_gen_batches": 0}
    named = differences(f"{PAPER}_wo_ds", PAPER)
    assert named == off | {"run.name": f"{PAPER}_wo_ds", "run.dir": f"runs/{PAPER}_wo_ds"}
    early = differences(f"{PAPER}_early", f"{PAPER}_wo_ds")
    assert early == {
        "run.name": f"{PAPER}_early",
        "run.dir": f"runs/{PAPER}_early",
        "loss.agg": "seq-mean-token-mean",
    }


def test_the_small_model_differs_in_size_alone() -> None:
    assert set(differences("qwen2.5_7b_dapo", PAPER)) == {
        "run.name",
        "run.dir",
        "model.path",
        "rollout.num_workers",
        "rollout.tensor_parallel",
        "learner.ranks",
        "learner.shards",
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_planned_without_gpu_model_or_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = plan(name, [])
    assert text.startswith(f"{name} in runs/{name}\n")
    assert "memory     by formula" in text


@pytest.mark.parametrize(
    ("name", "overrides", "num_gpus", "needed"),
    [
        ("qwen2.5_7b_dapo", [], 8, "50.7 of 79, of which 3.84 are the reserve"),
        ("qwen2.5_7b_dapo", ["model.path=Qwen/Qwen2.5-14B"], 8, "87.2 of 139, of which 5.58 are the reserve"),
        (PAPER, [], 128, "54.8 of 79, of which 4.04 are the reserve"),
        (f"{PAPER}_wo_ds", [], 128, "54.8 of 79, of which 4.04 are the reserve"),
        (f"{PAPER}_early", [], 128, "54.8 of 79, of which 4.04 are the reserve"),
    ],
)
def test_learner_and_engines_fit_the_gpus_that_a_config_asks_for(
    name: str, overrides: list[str], num_gpus: int, needed: str
) -> None:
    """The parts are computed by hand in tests/controller/fleet/test_memory.py."""
    text = plan(name, overrides)
    assert f"{num_gpus} GPUs, separate" in text
    [line] = [line for line in text.splitlines() if f" of {needed.split(' of ')[1].split(',')[0]}, " in line]
    assert f"a rank of the learner fits: it takes {needed}; an engine fits" in line


@pytest.mark.parametrize("name", NAMES)
def test_the_first_lines_of_a_config_name_it(name: str) -> None:
    comments = (FOLDER / f"{name}.yaml").read_text().split("run:")[0]
    assert "asyncdapo launch " + name in comments or "base: " in comments


# ---------------------------------------------------------------------------------------------------------------- base


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_says_what_differs_from_its_base_and_the_command_line_wins(tmp_path: Path) -> None:
    write(tmp_path / "whole.yaml", "model: {path: tiny}\nrun: {name: whole, steps: 3}\nlearner: {lr: 0.1}\n")
    write(tmp_path / "middle.yaml", "base: whole.yaml\nrun: {name: middle}\n")
    path = write(tmp_path / "last.yaml", "base: middle.yaml\nlearner: {ranks: 2}\n")
    config = load_config(path, ["run.steps=5"])
    assert (config.model.path, config.run.name, config.run.dir) == ("tiny", "middle", "runs/middle")
    assert (config.run.steps, config.learner.lr, config.learner.ranks) == (5, 0.1, 2)


def test_a_base_that_is_missing_or_leads_back_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "base: other.yaml\nmodel: {path: tiny}\n")
    with pytest.raises(ConfigError, match=r"base: of .*mine.yaml is not a file, got 'other.yaml'"):
        load_config(path)
    write(tmp_path / "other.yaml", "base: mine.yaml\n")
    with pytest.raises(ConfigError, match=r"base: of .*other.yaml leads back to itself"):
        load_config(path)


def test_a_base_is_named_in_a_file_and_not_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "model: {path: tiny}\n")
    with pytest.raises(ConfigError, match="base: is not a known key"):
        load_config(path, ["base=other.yaml"])


def test_models_beside_a_base_are_found_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "configs" / "models" / "tiny").mkdir(parents=True)
    write(tmp_path / "configs" / "whole.yaml", "model: {path: models/tiny, tokenizer: some/id}\n")
    path = write(tmp_path / "mine.yaml", "base: configs/whole.yaml\nrun: {steps: 2}\n")
    model = load_config(path).model
    assert (model.path, model.tokenizer) == (str(tmp_path / "configs" / "models" / "tiny"), "some/id")
    assert load_config(path, ["model.path=other"]).model.path == "other"
