"""Which tensors of a model's files are its weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from asyncdapo.errors import ConfigError
from asyncdapo.model.tensor_names import INDEX, read_shapes, weight_names

NAMES = {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}


def test_a_second_copy_of_a_tied_embedding_and_angles_are_no_weights():
    more = NAMES | {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert weight_names(more, tied=True) == NAMES
    assert weight_names(more, tied=False) == NAMES | {"lm_head.weight"}


def test_shapes_come_from_the_headers_of_the_model_s_own_files(tmp_path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model-1-of-2.safetensors")
    save_file({"b": torch.zeros(5)}, tmp_path / "model-2-of-2.safetensors")
    save_file({"layers.0.wq": torch.zeros(7)}, tmp_path / "consolidated.safetensors")  # the same in another format
    assert read_shapes(tmp_path) == {}
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}})
    )
    assert read_shapes(tmp_path) == {"a": (2, 3), "b": (5,)}


def test_a_file_that_is_cut_short_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3)}, file)
    whole = file.read_bytes()
    for length in (0, 4, 20, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(
            ConfigError, match=r"model\.path: can't read model\.safetensors: .*fetch the model's files again"
        ):
            read_shapes(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_cannot_be_read_is_named(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ConfigError, match=rf"model\.path: can't read {INDEX}"):
        read_shapes(tmp_path)


def test_a_file_of_the_index_that_is_missing_is_named(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-1-of-1.safetensors"}}')
    with pytest.raises(ConfigError, match=r"model\.path: can't read model-1-of-1\.safetensors"):
        read_shapes(tmp_path)
