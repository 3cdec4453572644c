"""Formulas of a shape, against what models of such shapes really hold, compute and leave behind."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from asyncdapo.learner.attention import attention
from asyncdapo.learner.attention.attention import NAME
from asyncdapo.learner.attention.attention_layout import Layout
from asyncdapo.learner.model.blocks import settle_blocks
from asyncdapo.model.shape import PEAK_FLOPS, PUBLISHED, Shape, peak_flops, read_shape
from tests.controller.runs import START_MODEL
from tests.learner.tiny import needs_c_compiler

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-head-dim": LlamaConfig(**SIZES, head_dim=32),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
KINDS = ["llama", "qwen2", "qwen3"]
CHECKPOINTING = ["none", "selective", "full"]
NUM_TOKENS = 384


def shape_of(config: PretrainedConfig) -> Shape:
    shape = read_shape(json.loads(config.to_json_string(use_diff=False)))
    assert shape is not None
    return shape


def settled(name: str, dtype: str, checkpointing: str) -> PreTrainedModel:
    """A model that computes as the learner's does."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=getattr(torch, dtype), attn_implementation=NAME)
    settle_blocks(model.eval(), model.device, compile=False, checkpointing=checkpointing)
    return model


def hidden_states(model: PreTrainedModel) -> torch.Tensor:
    """Of one packed sequence, [tokens, hidden size]."""
    tokens_S = torch.arange(NUM_TOKENS)[None] % SIZES["vocab_size"]
    layout = Layout(*(np.array([number]) for number in (0, 32, 32, NUM_TOKENS - 32)), torch.device("cpu"))
    return model.base_model(tokens_S, use_cache=False, layout=layout).last_hidden_state[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_counts_the_parameters_that_there_are(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    assert shape_of(CONFIGS[name]).num_parameters == model.num_parameters()


def test_the_shipped_model_is_counted_as_it_is() -> None:
    model = AutoModelForCausalLM.from_pretrained(START_MODEL)
    shape = read_shape(json.loads((START_MODEL / "config.json").read_text()))
    assert shape is not None
    assert shape.num_parameters == model.num_parameters()


def test_what_has_no_formula_is_not_guessed() -> None:
    assert read_shape({"model_type": "gpt2", **SIZES}) is None
    assert read_shape({"model_type": "llama"}) is None


# ---------------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("name", KINDS)
def test_the_operations_are_those_of_every_matrix_product_that_runs(name: str) -> None:
    """Eager attention computes all pairs, those that the causal mask hides included, and nothing twice."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    tokens_BT = torch.arange(2 * 64).view(2, 64)
    with FlopCounterMode(display=False) as counter:
        logits_BTV = model(tokens_BT, use_cache=False).logits
        forward = counter.get_total_flops()
        logits_BTV.sum().backward()
    shape, counts = shape_of(CONFIGS[name]), (2 * 64, 2 * 64, 2 * 64 * 64)
    assert forward == shape.forward_flops(*counts)
    assert counter.get_total_flops() == shape.train_flops(*counts)


@given(*[st.tuples(*[st.integers(0, 1 << 30)] * 3)] * 2)
def test_operations_add_up_over_parts(one: tuple[int, int, int], other: tuple[int, int, int]) -> None:
    shape = shape_of(CONFIGS["qwen3"])
    both = tuple(a + b for a, b in zip(one, other, strict=True))
    assert shape.train_flops(*one) + shape.train_flops(*other) == shape.train_flops(*both)


def test_a_token_of_a_large_model_takes_six_operations_a_parameter() -> None:
    shape = read_shape(PUBLISHED["Qwen/Qwen2.5-32B"])
    assert shape is not None
    products = shape.num_parameters - shape.vocab_size * shape.hidden_size  # an embedding is looked up
    assert shape.train_flops(1000, 1000, 0) == pytest.approx(6 * products * 1000, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "listed_as"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_a_gpu_is_known_by_the_words_of_its_name(name: str, listed_as: str) -> None:
    assert peak_flops(name) == PEAK_FLOPS[listed_as]


@pytest.mark.parametrize("name", ["NVIDIA A10", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4", ""])
def test_of_an_unknown_gpu_or_a_part_of_one_no_peak_is_guessed(name: str) -> None:
    assert peak_flops(name) is None


# -------------------------------------------------------------------------------------------------------------- memory


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, as long as anything holds them, and their peak."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Those that the model has already aren't counted."""
        super().__init__()
        tensors = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())]
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in tensors if tensor is not None)
        self.num_bytes = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.change, -storage.nbytes())
                self.change(storage.nbytes())
        self.peak = max(self.peak, self.num_bytes)
        return made

    def change(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes


@pytest.fixture
def in_rectangles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as it is without a C compiler."""
    monkeypatch.setattr(attention, "can_compute", lambda *_: False)


@needs_c_compiler
def test_compiled_attention_keeps_less_by_the_copy_of_its_result() -> None:
    model, shape = settled("llama", "float32", "none"), shape_of(CONFIGS["llama"])
    with LivingBytes(model) as living:
        hidden_SH = hidden_states(model)
    assert hidden_SH.requires_grad
    copies = 4 * shape.num_layers * shape.num_heads * shape.head_dim
    num_bytes = shape.kept_bytes("float32", "none", flash=False) - copies
    assert living.num_bytes / NUM_TOKENS == pytest.approx(num_bytes, rel=0.02)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("in_rectangles")
def test_a_forward_pass_keeps_what_the_formula_says(name: str, dtype: str, checkpointing: str) -> None:
    model = settled(name, dtype, checkpointing)
    with LivingBytes(model) as living:
        hidden_SH = hidden_states(model)
    assert hidden_SH.requires_grad
    num_bytes = shape_of(CONFIGS[name]).kept_bytes(dtype, checkpointing, flash=False)
    assert living.num_bytes / NUM_TOKENS == pytest.approx(num_bytes, rel=0.02)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("in_rectangles")
def test_a_backward_pass_has_its_peak_close_below_the_formula(name: str, dtype: str, checkpointing: str) -> None:
    """In three blocks what one has at work weighs more than in real models, and there the formula is loose."""
    model = settled(name, dtype, checkpointing)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LivingBytes(model) as living:
        hidden_states(model).sum().backward()
    shape, how = shape_of(CONFIGS[name]), {"dtype": dtype, "checkpointing": checkpointing, "flash": False}
    formula = NUM_TOKENS * (shape.kept_bytes(**how) + shape.work_bytes(**how))
    largest = max(parameter.nbytes for parameter in model.parameters())  # a gradient on its way to `.grad`
    assert 0.85 * formula < living.peak < formula + largest


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-32B"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_what_a_token_keeps_does_not_depend_on_the_vocabulary(name: str, checkpointing: str) -> None:
    large = read_shape(PUBLISHED[name])
    assert large is not None
    small = replace(large, vocab_size=32_000)
    how = {"dtype": "bfloat16", "checkpointing": checkpointing, "flash": True}
    assert small.kept_bytes(**how) == large.kept_bytes(**how)
    assert small.work_bytes(**how) == large.work_bytes(**how)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_more_is_computed_again_the_less_is_kept(dtype: str) -> None:
    shape = read_shape(PUBLISHED["Qwen/Qwen2.5-1.5B"])
    assert shape is not None
    none, selective, full = (shape.kept_bytes(dtype, how, flash=False) for how in CHECKPOINTING)
    assert none > 2 * selective > 4 * full
