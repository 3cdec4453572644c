"""What the config.json of a decoder of the llama family leaves out: the defaults of its `model_type`.

In: a config.json. Out: the same with every key that sizes and the torch engine are read from, as transformers' config
of that type has it (a test compares them). Those classes import transformers' kernels and generation, and with them
PyTorch's compiler and sharding: two seconds of the start of every rollout process. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALL = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False}
WINDOW = {"sliding_window": 4096}
QWEN = ALL | WINDOW | {"eos_token_id": None, "num_key_value_heads": 32, "max_position_embeddings": 32768}
QWEN |= {"use_sliding_window": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": ALL | {"eos_token_id": 2, "max_position_embeddings": 2048},
    "mistral": ALL | WINDOW | {"eos_token_id": 2, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": QWEN,
    "qwen3": QWEN | {"head_dim": 128},
}
ROPE_THETA = 10000.0


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what it leaves out. One of a type without defaults here stays as it is."""
    defaults = DEFAULTS.get(config.get("model_type", ""))
    return dict(config) if defaults is None else {**defaults, **config, "rope_parameters": _rope_parameters(config)}


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Older files have `rope_theta`, and `rope_scaling` with its `type`."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", ROPE_THETA))
    rope.setdefault("rope_type", rope.get("type", "default"))
    if (factor := config.get("partial_rotary_factor")) is not None:
        rope.setdefault("partial_rotary_factor", factor)
    return rope
