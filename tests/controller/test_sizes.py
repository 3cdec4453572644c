"""Formulas of memory, against what a model of that shape really holds and leaves behind."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from asyncdapo.config import Config, config_from_dict
from asyncdapo.controller.sizes import Shape, engine_bytes, learner_bytes, read_shape
from asyncdapo.learner.model import token_logprobs
from tests.controller.runs import START_MODEL

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 256,
}
CONFIGS = [
    LlamaConfig(**SIZES),
    LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    LlamaConfig(**SIZES, head_dim=32),
    MistralConfig(**SIZES, sliding_window=None),
    Qwen2Config(**SIZES, tie_word_embeddings=True),
    Qwen3Config(**SIZES, head_dim=32),
]
LABELS = ["llama", "llama-biases", "llama-head-dim", "mistral", "qwen2", "qwen3"]


def shape_of(config: PretrainedConfig) -> Shape:
    shape = read_shape(json.loads(config.to_json_string(use_diff=False)))
    assert shape is not None
    return shape


@pytest.mark.parametrize("config", CONFIGS, ids=LABELS)
def test_the_formula_counts_the_parameters_that_there_are(config: PretrainedConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(config).num_parameters == model.num_parameters()


def test_the_shipped_model_is_counted_as_it_is() -> None:
    model = AutoModelForCausalLM.from_pretrained(START_MODEL)
    shape = read_shape(json.loads((START_MODEL / "config.json").read_text()))
    assert shape is not None
    assert shape.num_parameters == model.num_parameters()


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4], CONFIGS[5]], ids=["llama", "qwen2", "qwen3"])
def test_the_formula_of_activations_is_near_what_autograd_keeps(config: PretrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens_BT = torch.randint(0, config.vocab_size, (2, 128))
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    mask_BT[:, 0] = False
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logp_BT, _ = token_logprobs(model, tokens_BT, mask_BT, 1.0)
    num_kept = sum(storage.nbytes() for storage in kept.values()) / 4 / tokens_BT.numel()
    assert logp_BT.requires_grad
    assert num_kept == pytest.approx(shape_of(config).num_activations + config.vocab_size, rel=0.1)


def test_what_has_no_formula_is_not_guessed() -> None:
    assert read_shape({"model_type": "gpt2", **SIZES}) is None
    assert read_shape({"model_type": "llama"}) is None


def config_of(**sections: dict[str, object]) -> Config:
    return config_from_dict({"model": {"path": "none"}, **sections})


def test_a_learner_holds_four_numbers_a_parameter_and_a_fifth_with_a_reference_model() -> None:
    shape = shape_of(CONFIGS[0])
    plain = learner_bytes(shape, config_of())
    fixed = {key: number for key, number in plain.items() if "micro-batch" not in key}
    assert sum(fixed.values()) == 16 * shape.num_parameters
    with_reference = learner_bytes(shape, config_of(loss={"kl_coef": 0.1}))
    assert sum(with_reference.values()) - sum(plain.values()) == 4 * shape.num_parameters


def test_a_micro_batch_has_room_for_the_longest_sequence() -> None:
    shape = shape_of(CONFIGS[0])
    config = config_of(learner={"tokens_per_microbatch": 512}, rollout={"max_response_length": 1000})
    assert "a micro-batch of 2,024 tokens" in learner_bytes(shape, config)


def test_an_engine_holds_the_weights_twice_and_its_slots_in_its_own_number_format() -> None:
    shape = shape_of(CONFIGS[0])
    rollout = {"slots": 8, "max_response_length": 76, "dtype": "bfloat16"}
    parts = engine_bytes(shape, config_of(rollout=rollout, prompts={"max_prompt_length": 24}))
    cache = 2 * 3 * 8 * 100 * 2 * 16 * 2  # keys and values, layers, slots, tokens, heads, dims, bytes
    assert parts == {
        "weights": 2 * shape.num_parameters,
        "KV cache of 8 x 100 tokens": cache,
        "new weights as they arrive": 2 * shape.num_parameters,
    }
