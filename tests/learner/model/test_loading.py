"""Each rank reads its own slices of a model's files, and what was made without files is what Hugging Face makes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from asyncdapo.errors import ConfigError
from asyncdapo.learner.model import model
from asyncdapo.learner.step.ranks import Ranks
from tests.learner.ranks import in_processes, with_shards
from tests.learner.tiny import SHAPE, make_learner, save_tiny_llama

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}


def save_kind(directory, kind, **changes) -> str:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, "head_dim": 8, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"rope_parameters": YARN}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("gemma3_text", {}),
    ],
)
def test_weights_and_buffers_are_those_that_hugging_face_loads(tmp_path, monkeypatch, kind, changes) -> None:
    path = save_kind(tmp_path, kind, **changes)
    monkeypatch.setattr(model, "load_model", None)  # nobody loads it whole
    loaded, expected = make_learner(path)._policy.model, AutoModelForCausalLM.from_pretrained(path)
    for ours, theirs in ((loaded.named_buffers(), expected.named_buffers()),):
        buffers = dict(theirs)
        assert {name: buffer.tolist() for name, buffer in ours} == {name: one.tolist() for name, one in buffers.items()}
        assert buffers
    weights = make_learner(path).weights()
    state = expected.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in weights.items())
    assert ("lm_head.weight" in weights) is not expected.config.tie_word_embeddings


def read(ranks: Ranks, path: str) -> dict[str, torch.Tensor]:
    return make_learner(path, ranks=with_shards(ranks, 2)).weights()


def test_the_slices_of_all_ranks_are_the_model(tmp_path) -> None:
    """In two files, and in bfloat16."""
    path = save_tiny_llama(tmp_path, tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    parts = [load_file(file) for file in tmp_path.glob("model-*.safetensors")]
    assert len(parts) > 1
    saved = {name: tensor for part in parts for name, tensor in part.items()}
    for weights in in_processes(2, read, path):
        assert weights.keys() == saved.keys()
        assert all(torch.equal(weight, saved[name].float()) for name, weight in weights.items())


def test_pickled_weights_are_loaded_whole(tmp_path) -> None:
    path = save_tiny_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    loaded = make_learner(path).weights()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_a_tensor_of_another_shape_than_the_config_says_is_named(tmp_path) -> None:
    path = save_tiny_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"its model.norm.weight has the shape \[16\], the model one of \[32\]"):
        make_learner(path)
