"""Sizes: memory of a run by formula, from the shape in the model's config.json. Pure.

In: what config.json says, the configuration. Out: bytes by what they are for, in a learner's rank and in an engine.
None of it is measured: CUDA's own memory (about half a GiB a process), fragmentation and the working memory of kernels
come on top. Does not own: how much there is.

Shape: Q query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncdapo.config import Config
from asyncdapo.rollout.config import DTYPE_BYTES, MODEL_TYPES

FLOAT32_BYTES = DTYPE_BYTES["float32"]
SIZES = {"num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"}
LOGIT_COPIES = 4
"""Of a token's logits at the peak of a forward pass: themselves, their log-softmax, and two on the way to entropy."""
GPU_GIB = {"80 GB": 79, "141 GB": 139}
"""What a process finds on GPUs of the two common sizes (H100 and H200), by the size in their data sheets."""
QWEN25 = {"model_type": "qwen2", "tie_word_embeddings": False, "vocab_size": 152064}
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN25
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "Qwen/Qwen2.5-7B": QWEN25
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
    "Qwen/Qwen2.5-32B": QWEN25
    | {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
    | {"num_attention_heads": 40, "num_key_value_heads": 8},
}
"""What config.json of the models in configs/ says, so that a plan knows their sizes before they are here."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder of the llama family."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def num_parameters(self) -> int:
        hidden, inner, heads_D = self.hidden_size, self.intermediate_size, self.num_heads * self.head_dim
        qkv_D = heads_D + 2 * self.num_kv_heads * self.head_dim
        attention = hidden * (qkv_D + heads_D) + self.qkv_bias * qkv_D + self.out_bias * hidden
        mlp = 3 * hidden * inner + self.mlp_bias * (2 * inner + hidden)
        norms = 2 * hidden + self.qk_norm * 2 * self.head_dim
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * hidden
        return embeddings + self.num_layers * (attention + mlp + norms) + hidden

    @property
    def num_activations(self) -> int:
        """Numbers that a token leaves behind in a forward pass for the backward pass, without logits."""
        heads_D = (self.num_heads + self.num_kv_heads) * self.head_dim
        times = 4 if self.qk_norm else 2
        return self.num_layers * (6 * self.hidden_size + times * heads_D + 4 * self.intermediate_size)

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]


def read_shape(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a config.json describes; None for a kind of model whose formula isn't known here."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES or not config.keys() >= SIZES:
        return None
    heads, biases = config["num_attention_heads"], config.get("attention_bias", False)
    return Shape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        tied_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=biases or kind == "qwen2",
        out_bias=biases,
        mlp_bias=config.get("mlp_bias", False),
        qk_norm=kind == "qwen3",
    )


def learner_bytes(shape: Shape, config: Config) -> dict[str, int]:
    """Of each rank: everything is float32, and every rank holds everything."""
    weights = FLOAT32_BYTES * shape.num_parameters
    longest = config.prompts.max_prompt_length + config.rollout.max_response_length
    num_tokens = max(config.learner.tokens_per_microbatch, longest)
    of_a_token = FLOAT32_BYTES * (shape.num_activations + LOGIT_COPIES * shape.vocab_size)
    parts = {
        "weights": weights,
        "gradients": weights,
        "AdamW": 2 * weights,
        f"a micro-batch of {num_tokens:,} tokens": num_tokens * of_a_token,
    }
    return parts | ({"the reference model": weights} if config.loss.kl_coef else {})


def sequences_in(shape: Shape, config: Config, num_bytes: float) -> int:
    """How many full-length sequences an engine has room for in all, where it may take `num_bytes` of each of its GPUs;
    negative where its weights alone are more. New weights then arrive in memory of the host."""
    rollout = config.rollout
    longest = config.prompts.max_prompt_length + rollout.max_response_length
    left = rollout.tensor_parallel * num_bytes - DTYPE_BYTES[rollout.dtype] * shape.num_parameters
    return math.floor(left / (longest * shape.kv_bytes(rollout.dtype)))


def engine_bytes(shape: Shape, config: Config) -> dict[str, int]:
    """Of each engine, over all of its GPUs, with a full-length sequence in every slot. vLLM may have less for the KV
    cache: then sequences wait."""
    rollout = config.rollout
    weights = DTYPE_BYTES[rollout.dtype] * shape.num_parameters
    longest = config.prompts.max_prompt_length + rollout.max_response_length
    cache = rollout.slots * longest * shape.kv_bytes(rollout.dtype)
    return {
        "weights": weights,
        f"KV cache of {rollout.slots} x {longest:,} tokens": cache,
        "new weights as they arrive": weights,
    }
