"""Models that can't be trained, or not published, are refused before any process starts."""

import json
from pathlib import Path

import pytest

from asyncdapo.config.config import Config, config_from_dict
from asyncdapo.controller.checks.preflight import prepare_run
from asyncdapo.controller.roles.model_check import check_learnable
from asyncdapo.errors import ConfigError
from tests.learner.model.test_names import MIXTURES, save_random

SHORT = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def config_of(model: dict, loss: dict | None = None) -> Config:
    return config_from_dict(
        {
            "model": model,
            "loss": loss or {},
            "prompts": {"max_prompt_length": 64},
            "rollout": {"max_response_length": 64, "engine": "vllm"},
        }
    )


def with_rotation(directory: Path, **config: object) -> str:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "rope_scaling": SHORT, **config}))
    return str(directory)


def test_longrope_is_refused_where_prompt_and_response_can_be_longer_than_its_first_angles_reach(
    tmp_path: Path,
) -> None:
    check_learnable(config_of({"path": with_rotation(tmp_path / "far", original_max_position_embeddings=128)}))
    near = with_rotation(tmp_path / "near", original_max_position_embeddings=127)
    with pytest.raises(ConfigError, match=r"model\.path: can't be trained: its rope_type is longrope.* 128 together"):
        check_learnable(config_of({"path": near}))


def test_a_reference_is_checked_too(tmp_path: Path) -> None:
    model = {"path": "none", "reference": with_rotation(tmp_path / "model")}
    with pytest.raises(ConfigError, match=r"model\.reference: can't be trained"):
        check_learnable(config_of(model, {"kl_coef": 0.1}))


def test_a_mixture_that_could_not_be_published_starts_nothing_and_takes_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run_dir = save_random(tmp_path / "model", "qwen3_moe", **MIXTURES["qwen3_moe"]), tmp_path / "run"
    # there is no tokenizer
    monkeypatch.setattr("asyncdapo.controller.checks.preflight.check_config", lambda config: None)
    overrides = [f"model.path={path}", "rollout.engine=vllm", "rollout.max_response_length=64", f"run.dir={run_dir}"]
    refused = pytest.raises(ConfigError, match=r"model\.path: can't be sent to an engine: the learner has .*experts")
    with refused, prepare_run("quickstart", overrides):
        pass
    assert not run_dir.exists()
