"""Files of a model that are missing, damaged or of another model are found before any process starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from asyncdapo.config.config import load_config
from asyncdapo.controller.checks.preflight import check_config, effective
from asyncdapo.errors import ConfigError
from asyncdapo.model.files import INDEX, WHOLE
from tests.controller.runs import START_MODEL, copy_start_model

QUICKSTART = START_MODEL.parent.parent / "quickstart.yaml"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The quickstart's model, in two files."""
    directory = copy_start_model(tmp_path / "model")
    tensors = load_file(directory / WHOLE)
    (directory / WHOLE).unlink()
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, directory / shard)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def check(path: Path | str, *overrides: str) -> None:
    config = load_config(QUICKSTART, [f"model.path={path}", "metrics.wandb=disabled", *overrides])
    check_config(effective(config, Path.cwd()))


def test_a_model_in_several_files_is_accepted(model: Path) -> None:
    check(model)


@pytest.mark.parametrize(
    ("shard", "left", "words"),
    [
        (SHARDS[1], None, f"lacks 1 of the 2 files that {INDEX} names, first {SHARDS[1]}"),
        (SHARDS[1], 0, f"can't read {SHARDS[1]}"),
        (SHARDS[0], 20, f"can't read {SHARDS[0]}"),
        (SHARDS[0], -1, f"can't read {SHARDS[0]}"),
        (INDEX, 100, f"can't read {INDEX}"),
        (INDEX, None, f"has {SHARDS[0]}, and neither {WHOLE} nor {INDEX}"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", 500, "tokenizer.json can't be read"),
    ],
)
def test_a_file_that_is_missing_or_cut_off_is_named(model: Path, shard: str, left: int | None, words: str) -> None:
    """`left`: bytes, from the end where it is negative; None is no file."""
    path = model / shard
    if left is None:
        path.unlink()
    else:
        os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    with pytest.raises(ConfigError) as caught:
        check(model)
    assert caught.value.key == "model.path"
    assert words in str(caught.value)


def test_a_tensor_that_the_index_names_and_no_file_holds_is_named(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.layers.99.mlp.weight"] = SHARDS[0]
    (model / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"lacks 1 tensors that .*, first model.layers.99.mlp.weight"):
        check(model)


def test_a_reference_model_is_looked_at_as_well(model: Path) -> None:
    (model / SHARDS[1]).unlink()
    with pytest.raises(ConfigError, match=f"model.reference: lacks 1 of the 2 files that {INDEX} names"):
        check(START_MODEL, f"model.reference={model}", "loss.kl_coef=0.1")


def test_files_of_a_cached_model_that_are_still_to_be_downloaded_are_passed_over(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "0"
    snapshot.parent.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0")
    (model / SHARDS[1]).unlink()
    model.rename(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    check("some/model")
    os.truncate(snapshot / SHARDS[0], 100)
    with pytest.raises(ConfigError, match=f"can't read {SHARDS[0]}"):
        check("some/model")


@pytest.mark.parametrize("beside", [False, True])
def test_a_tokenizer_of_another_model_is_told_by_its_size(model: Path, tmp_path: Path, beside: bool) -> None:
    """As `model.tokenizer`, and in the model's own directory."""
    directory = copy_start_model(tmp_path / "other") if beside else model
    content = json.loads((directory / "tokenizer.json").read_text())
    for number in range(200):
        content["model"]["vocab"][f"word{number}"] = 103 + number
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        check(model, *([f"model.tokenizer={directory}"] if beside else []))
    assert caught.value.key == ("model.tokenizer" if beside else "model.path")
    assert "its tokenizer is of another model: it has 303 tokens, the model 103" in str(caught.value)
