"""A config.json that leaves keys out is read as transformers reads it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from asyncdapo.model.shape import MODEL_TYPES, read_shape
from asyncdapo.model.type_defaults import DEFAULTS, with_defaults

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 50,
}
WRITTEN = {
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "max_position_embeddings": 777,
    "eos_token_id": [3, 4],
    "use_sliding_window": True,
    "sliding_window": 16,
}
ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 1e6},
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 3e4, "factor": 2.0}},
    {"rope_scaling": None, "rope_theta": 2e4, "partial_rotary_factor": 0.5},
]
READ = ("hidden_act", "rms_norm_eps", "max_position_embeddings", "eos_token_id")


def test_every_type_that_the_engine_computes_has_its_defaults() -> None:
    assert set(DEFAULTS) == set(MODEL_TYPES)


@pytest.mark.parametrize("kind", MODEL_TYPES)
@given(left_out=st.sets(st.sampled_from(sorted(WRITTEN))), rope=st.sampled_from(ROPES))
def test_what_is_left_out_is_what_transformers_has(kind: str, left_out: set[str], rope: dict[str, Any]) -> None:
    config = {"model_type": kind, **SIZES, **rope}
    config |= {key: value for key, value in WRITTEN.items() if key not in left_out}
    theirs, ours = AutoConfig.for_model(**config).to_dict(), with_defaults(config)
    assert {key: ours[key] for key in READ} == {key: theirs[key] for key in READ}
    assert ours["rope_parameters"].items() >= theirs["rope_parameters"].items()
    shape, expected = read_shape(config), read_shape(theirs)
    assert shape is not None
    assert expected is not None
    assert asdict(shape) == asdict(expected)
    is_sliding = ours.get("sliding_window") if ours.get("use_sliding_window", True) else None
    if kind != "llama":  # has no such key
        assert is_sliding == theirs["sliding_window"]
