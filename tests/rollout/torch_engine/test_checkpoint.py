"""What a checkpoint directory must hold, and how the engine says what it lacks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncdapo.errors import ConfigError
from asyncdapo.model.files import ModelFiles, TokenizerFiles
from asyncdapo.model.stop_tokens import stop_token_ids
from asyncdapo.rollout.torch_engine.checkpoint import read_checkpoint
from asyncdapo.rollout.torch_engine.weights import Weights

from .models import ROPE, random_model, saved


def changed(path, file="config.json", **changes):
    target = f"{path}/{file}"
    with open(target) as config:
        settings = json.load(config)
    with open(target, "w") as config:
        json.dump(settings | changes, config)
    return path


def test_stop_ids_come_from_both_config_files_and_may_be_lists(tmp_path):
    path = saved(random_model(eos_token_id=3), tmp_path)
    assert read_checkpoint(path).stop_token_ids == {3}
    changed(path, "generation_config.json", eos_token_id=[5, 7])
    assert read_checkpoint(path).stop_token_ids == {3, 5, 7}


START = Path(__file__).parents[3] / "configs" / "models" / "chain_start"


def test_the_end_token_of_the_tokenizer_stops_too(tmp_path):
    """Chat models often name the end of a turn only there."""
    path = saved(random_model(eos_token_id=3), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(START / name, path)
    assert read_checkpoint(path).stop_token_ids == {2, 3}
    changed(path, "tokenizer_config.json", eos_token={"content": "<pad>", "lstrip": False})
    assert read_checkpoint(path).stop_token_ids == {0, 3}


def test_another_tokenizer_says_its_own_end(tmp_path):
    files = ModelFiles(saved(random_model(eos_token_id=3), tmp_path))
    assert stop_token_ids(files, TokenizerFiles(str(START))) == {2, 3}
    with pytest.raises(ConfigError, match="model.tokenizer: is neither a directory nor a tokenizer that the hub"):
        stop_token_ids(files, TokenizerFiles("../no/such"))


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"eos'])
def test_a_file_of_stop_ids_that_cannot_be_read_is_named(tmp_path, name, content):
    files = ModelFiles(saved(random_model(), tmp_path))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(START / file, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"model.path: {name}"):
        stop_token_ids(files)


def test_a_model_without_stop_ids_has_none(tmp_path):
    assert read_checkpoint(saved(random_model(), tmp_path)).stop_token_ids == frozenset()


def test_rope_settings_of_older_checkpoints_are_read(tmp_path):
    path = saved(random_model("linear rope"), tmp_path)
    new = read_checkpoint(path)
    with open(f"{path}/config.json") as config:
        settings = json.load(config)
    del settings["rope_parameters"]
    settings |= {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    with open(f"{path}/config.json", "w") as config:
        json.dump(settings, config)
    assert torch.equal(read_checkpoint(path).frequencies_P, new.frequencies_P)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "nothing_known"}, "nothing_known"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_a_model_that_the_engine_does_not_compute_is_refused_by_name(changes, named, tmp_path):
    path = changed(saved(random_model(), tmp_path), **changes)
    with pytest.raises(ConfigError, match=named):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [("mistral", {"sliding_window": 16}), ("qwen2.5", {"use_sliding_window": True, "sliding_window": 16})],
)
def test_sliding_window_attention_is_refused(shape, changes, tmp_path):
    path = saved(random_model(shape, max_window_layers=0), tmp_path)
    read_checkpoint(path)
    with open(f"{path}/config.json") as config:
        settings = {key: value for key, value in json.load(config).items() if key != "layer_types"}
    with open(f"{path}/config.json", "w") as config:
        json.dump(settings | changes, config)
    with pytest.raises(ConfigError, match="sliding window"):
        read_checkpoint(path)


def test_a_path_that_is_neither_directory_nor_hub_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="neither a directory nor"):
        read_checkpoint(str(tmp_path / "missing"))


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no config.json"):
        read_checkpoint(str(tmp_path))


def test_missing_weight_files_are_named(tmp_path):
    path = saved(random_model(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no model.safetensors"):
        read_checkpoint(path).tensors()


def test_a_damaged_weight_file_is_named(tmp_path):
    path = saved(random_model(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(ConfigError, match="can't read model.safetensors"):
        read_checkpoint(path).tensors()


def fill(path, edit):
    checkpoint = read_checkpoint(path)
    named = load_file(f"{path}/model.safetensors")
    edit(named)
    Weights(checkpoint.shape, torch.float32, torch.device("cpu")).fill(named)


def test_tensors_that_do_not_fit_the_model_are_named(tmp_path):
    path = saved(random_model(), tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=f"{name} is missing"):
        fill(path, lambda named: named.pop(name))
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 3\)"):
        fill(path, lambda named: named.update({name: torch.zeros(2, 3)}))
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj.bias"):
        fill(path, lambda named: named.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}))


def test_a_tied_output_projection_may_be_there_or_not(tmp_path):
    path = saved(random_model("llama"), tmp_path)
    named = load_file(f"{path}/model.safetensors")
    assert "lm_head.weight" not in named
    save_file(named | {"lm_head.weight": named["model.embed_tokens.weight"].clone()}, f"{path}/model.safetensors")
    fill(path, lambda named: None)
