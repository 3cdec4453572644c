"""Shape: sizes of a decoder of the llama family, and what follows from them by formula. Pure.

In: a config.json. Out: parameters, floating point operations, bytes of keys and values, bytes that a forward pass keeps
for the backward pass. Nothing is measured here; tests compare the formulas with real models.

Operations are those that the mathematics of the model needs, 2 for a multiplication and an addition: matrix products of
the blocks, logits, attention over the (query, key) pairs that attend. Norms, activation functions and the softmax are
below 1 % and left out. A backward pass costs twice a forward pass: the gradients of both factors of every product. What
is recomputed to save memory (`learner.activation_checkpointing`, log-probs) isn't counted.
MFU is then operations / seconds / the peak of the hardware (Chowdhery et al. 2022, PaLM, appendix B).

Does not own: how much memory there is, what a configuration makes of it (`controller/fleet/memory`).

Letters in comments: H hidden size, I intermediate size, Q query heads, K key/value heads, D head size, V
vocabulary, n bytes of a number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncdapo.model.type_defaults import with_defaults

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type`s whose formulas are known; those that the torch engine computes."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT32_BYTES = DTYPE_BYTES["float32"]
TOKEN_BYTES = 8
SIZES = {"num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"}

PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}
"""Dense operations a second in bfloat16, from the makers' data sheets (with sparsity they give twice as many), by the
words of the GPU's name in torch."""

QWEN25 = {"model_type": "qwen2", "tie_word_embeddings": False, "vocab_size": 152064}
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN25
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "Qwen/Qwen3-0.6B": {"model_type": "qwen3", "tie_word_embeddings": True, "vocab_size": 151936}
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
    | {"num_attention_heads": 16, "num_key_value_heads": 8},
    "Qwen/Qwen2.5-1.5B": QWEN25
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "Qwen/Qwen2.5-7B": QWEN25
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
    "Qwen/Qwen2.5-14B": QWEN25
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48}
    | {"num_attention_heads": 40, "num_key_value_heads": 8},
    "Qwen/Qwen2.5-32B": QWEN25
    | {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
    | {"num_attention_heads": 40, "num_key_value_heads": 8},
}
"""What config.json of the models in configs/ says, so that their sizes are known before they are here."""


def peak_flops(device_name: str) -> float | None:
    """Peak operations a second of the GPU with this name, such as `NVIDIA H100 80GB HBM3`. None for an unknown GPU, and
    for a part of one."""
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    known = [name for name in PEAK_FLOPS if words >= set(name.split())]
    return PEAK_FLOPS[max(known, key=len)] if known and "MIG" not in words else None


def settled_dtype(dtype: str, *, on_gpu: bool) -> str:
    """The number format that `auto` stands for on such a device. Any other format stays as it is."""
    return dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes and switches of a decoder of the llama family."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    """The output projection is the embedding; a checkpoint has it once."""
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMS norm of every query and key head before the rotation (Qwen3)."""

    @property
    def num_parameters(self) -> int:
        return self.num_root_parameters + self.num_layers * self.num_block_parameters

    @property
    def num_root_parameters(self) -> int:
        """Those outside the blocks: embedding, output layer, last norm."""
        return (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def num_block_parameters(self) -> int:
        """Those of a block."""
        hidden, inner = self.hidden_size, self.intermediate_size
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        biases = self.qkv_bias * qkv + self.out_bias * hidden + self.mlp_bias * (2 * inner + hidden)
        norms = 2 * hidden + self.qk_norm * 2 * self.head_dim
        return self.num_block_products + biases + norms

    @property
    def num_block_products(self) -> int:
        """Parameters of the matrices of a block: queries, keys, values, output; gate, up, down."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden_size * (2 * queries + 2 * keys) + 3 * self.hidden_size * self.intermediate_size

    # -------------------------------------------------------------------------------------------------- operations

    def forward_flops(self, num_tokens: int, num_logit_tokens: int, num_pairs: int) -> int:
        """Operations of a forward pass. `num_tokens` go through the blocks, and `num_logit_tokens` of them get logits;
        `num_pairs`: pairs of a query and a key that attend, each counted once, whatever the number of heads."""
        blocks = 2 * self.num_layers * self.num_block_products * num_tokens
        logits = 2 * self.hidden_size * self.vocab_size * num_logit_tokens
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * num_pairs  # scores, then a sum of values
        return blocks + logits + attention

    def train_flops(self, num_tokens: int, num_logit_tokens: int, num_pairs: int) -> int:
        """Operations of a forward and a backward pass over the same tokens."""
        return 3 * self.forward_flops(num_tokens, num_logit_tokens, num_pairs)

    @property
    def pair_cost(self) -> float:
        """Operations of attention for one query and one key, as a share of all other operations for one token."""
        return self.forward_flops(0, 0, 1) / self.forward_flops(1, 1, 0)

    # ------------------------------------------------------------------------------------------------------ memory

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]

    def attention_bytes(self, dtype: str, *, flash: bool) -> int:
        """Bytes that a token leaves in a block for the backward pass, without those inside the MLP.

        A norm keeps its input in float32 (n + 4 with the normalised values, and the reciprocal root); the products
        behind it keep its output. Attention keeps queries, keys, values, its result and a number a head for its
        softmax. With `flash`, the kernel of half precision on a GPU, keys and values are repeated for all query heads;
        without, the result is put in order again, which is a copy (but not in `attention.c`, which keeps less).
        """
        size, hidden = DTYPE_BYTES[dtype], self.hidden_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        norms = 2 * (_norm_bytes(hidden, size) + size * hidden)
        if self.qk_norm:
            norms += (self.num_heads + self.num_kv_heads) * _norm_bytes(self.head_dim, size)
        numbers = 4 * queries if flash else 3 * queries + 2 * keys
        return norms + size * numbers + FLOAT32_BYTES * self.num_heads

    def mlp_bytes(self, dtype: str) -> int:
        """Bytes that a token leaves inside an MLP: gate, its activation, up, their product."""
        return 4 * self.intermediate_size * DTYPE_BYTES[dtype]

    def kept_bytes(self, dtype: str, checkpointing: str, *, flash: bool) -> int:
        """Bytes that a forward pass keeps of a token for the backward pass, up to the last hidden states, under this
        `learner.activation_checkpointing`. torch.compile keeps less."""
        size = DTYPE_BYTES[dtype]
        of_a_block = {
            "none": self.attention_bytes(dtype, flash=flash) + self.mlp_bytes(dtype),
            "selective": self.attention_bytes(dtype, flash=flash),
            "full": size * self.hidden_size,
        }[checkpointing]
        last_norm = _norm_bytes(self.hidden_size, size) + size * self.hidden_size
        rotation = 2 * size * self.head_dim
        return self.num_layers * of_a_block + last_norm + rotation + TOKEN_BYTES

    def work_bytes(self, dtype: str, checkpointing: str, *, flash: bool) -> int:
        """Bytes that the backward pass needs for a token at its peak, besides those kept. In a block: what it
        recomputes, and the gradients of two tensors inside the MLP, of the output and of the input. In the last norm:
        the gradient of the output, and four float32 tensors on the way to that of the input."""
        size, hidden = DTYPE_BYTES[dtype], self.hidden_size
        again = {
            "none": 0,
            "selective": self.mlp_bytes(dtype),
            "full": self.attention_bytes(dtype, flash=flash) + self.mlp_bytes(dtype),
        }[checkpointing]
        of_a_block = again + size * (2 * self.intermediate_size + 2 * hidden)
        return max(of_a_block, (size + 4 * FLOAT32_BYTES) * hidden)


def _norm_bytes(width: int, size: int) -> int:
    """Bytes of an RMS norm of one token (or head): float32 input, normalised input, reciprocal root; not the output."""
    return (FLOAT32_BYTES + size) * width + FLOAT32_BYTES


def read_shape(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a config.json describes. None for a kind of model whose formulas aren't known here."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES or not config.keys() >= SIZES:
        return None
    config = with_defaults(config)
    heads, biases = config["num_attention_heads"], config["attention_bias"]
    return Shape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        tied_embeddings=config["tie_word_embeddings"],
        qkv_bias=biases or kind == "qwen2",
        out_bias=biases,
        mlp_bias=config.get("mlp_bias", False),
        qk_norm=kind == "qwen3",
    )
