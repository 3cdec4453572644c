"""Weights: turns named Hugging Face tensors into the fused buffers that the model computes with.

In: a mapping of Hugging Face names to tensors, the whole model, tied ones once. Out: the same numbers in one
projection for queries, keys and values, and one for gate and up. Two such sets exist: one generates while the other is
filled, so filling needs no pause. A set that could not be filled is never used.

In a Hugging Face head, the two members of a rotated pair are at i and i + head_dim / 2. Here they are neighbours, so
that one complex product rotates all pairs. Queries and keys share this permutation, so attention scores don't change.

Shapes: V vocabulary, H hidden, I intermediate, D head_dim, P = D / 2 pairs, R = rows of query, key and value heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from asyncdapo.model.tensor_names import TIED_HEAD, weight_names
from asyncdapo.rollout.torch_engine.checkpoint import ModelShape


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer. Projections have the shape they are multiplied in, [inputs, outputs] (transposed in
    memory)."""

    attention_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [H, R]
    qkv_bias: torch.Tensor | None  # [R]
    qk_norm: torch.Tensor | None  # [query and key heads, D]
    out: torch.Tensor  # [query heads * D, H]
    out_bias: torch.Tensor | None  # [H]
    mlp_norm: torch.Tensor  # [H]
    gate_up: torch.Tensor  # [H, 2 I]
    gate_up_bias: torch.Tensor | None  # [2 I]
    down: torch.Tensor  # [I, H]
    down_bias: torch.Tensor | None  # [H]


class Weights:
    """One full set of fused weights on the engine's device; `fill` overwrites it in place."""

    def __init__(
        self, shape: ModelShape, dtype: torch.dtype, device: torch.device, num_layers: int | None = None
    ) -> None:
        self._shape = shape
        self._new = lambda *sizes: torch.empty(*sizes, dtype=dtype, device=device)
        self.embedding = self._new(shape.vocab_size, shape.hidden_size)
        self.head = self.embedding if shape.tied_embeddings else self._new(shape.vocab_size, shape.hidden_size)
        self.norm = self._new(shape.hidden_size)
        self.layers = [self._new_layer() for _ in range(shape.num_layers if num_layers is None else num_layers)]

    def _new_layer(self) -> LayerWeights:
        shape, new = self._shape, self._new
        num_rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        return LayerWeights(
            attention_norm=new(shape.hidden_size),
            qkv=new(num_rows, shape.hidden_size).t(),
            qkv_bias=new(num_rows) if shape.qkv_bias else None,
            qk_norm=new(shape.num_heads + shape.num_kv_heads, shape.head_dim) if shape.qk_norm else None,
            out=new(shape.hidden_size, shape.num_heads * shape.head_dim).t(),
            out_bias=new(shape.hidden_size) if shape.out_bias else None,
            mlp_norm=new(shape.hidden_size),
            gate_up=new(2 * shape.intermediate_size, shape.hidden_size).t(),
            gate_up_bias=new(2 * shape.intermediate_size) if shape.mlp_bias else None,
            down=new(shape.hidden_size, shape.intermediate_size).t(),
            down_bias=new(shape.hidden_size) if shape.mlp_bias else None,
        )

    @torch.no_grad()
    def fill(self, named: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError for a missing, unknown or misshapen tensor; the set is then unusable."""
        weights = weight_names(named, tied=self._shape.tied_embeddings)
        unread = Unread({name: named[name] for name in weights})
        unread.copy("model.embed_tokens.weight", self.embedding)
        unread.copy("model.norm.weight", self.norm)
        if not self._shape.tied_embeddings:
            unread.copy(TIED_HEAD, self.head)
        for index in range(self._shape.num_layers):
            self._fill_layer(unread, index)
        unread.refuse_rest()
        if self.norm.is_cuda:  # a GPU copies asynchronously, and the next version overwrites the source
            torch.cuda.current_stream(self.norm.device).synchronize()

    def _fill_layer(self, unread: Unread, index: int) -> None:
        self._read_layer(unread, f"model.layers.{index}.", self.layers[index])

    def _read_layer(self, unread: Unread, prefix: str, layer: LayerWeights) -> None:
        attention, mlp, head_dim = prefix + "self_attn.", prefix + "mlp.", self._shape.head_dim
        num_heads, num_kv_heads = self._shape.num_heads, self._shape.num_kv_heads
        unread.copy(prefix + "input_layernorm.weight", layer.attention_norm)
        unread.copy(prefix + "post_attention_layernorm.weight", layer.mlp_norm)
        for kind, qkv, out, gate_up, down in (
            ("weight", layer.qkv.t(), layer.out.t(), layer.gate_up.t(), layer.down.t()),
            ("bias", layer.qkv_bias, layer.out_bias, layer.gate_up_bias, layer.down_bias),
        ):
            if qkv is not None:
                queries, keys, values = qkv.split([n * head_dim for n in (num_heads, num_kv_heads, num_kv_heads)])
                unread.copy(f"{attention}q_proj.{kind}", queries, paired=head_dim)
                unread.copy(f"{attention}k_proj.{kind}", keys, paired=head_dim)
                unread.copy(f"{attention}v_proj.{kind}", values)
            if out is not None:
                unread.copy(f"{attention}o_proj.{kind}", out)
            if gate_up is not None and down is not None:
                gate, up = gate_up.chunk(2)
                unread.copy(f"{mlp}gate_proj.{kind}", gate)
                unread.copy(f"{mlp}up_proj.{kind}", up)
                unread.copy(f"{mlp}down_proj.{kind}", down)
        if layer.qk_norm is not None:
            unread.copy(f"{attention}q_norm.weight", layer.qk_norm[0], paired=head_dim)
            unread.copy(f"{attention}k_norm.weight", layer.qk_norm[num_heads], paired=head_dim)
            layer.qk_norm[:num_heads] = layer.qk_norm[0].clone()
            layer.qk_norm[num_heads:] = layer.qk_norm[num_heads].clone()


class Unread:
    """Reads tensors of a mapping, and knows which have not been read."""

    def __init__(self, named: dict[str, torch.Tensor]) -> None:
        self._left = named

    def copy(self, name: str, target: torch.Tensor, paired: int = 0) -> None:
        """Copy into `target`; with `paired` = D the two halves of every D rows are interleaved."""
        source = self._left.pop(name, None)
        if source is None:
            raise ValueError(f"{name} is missing")
        if source.shape != target.shape:
            raise ValueError(f"{name} has shape {tuple(source.shape)}, the model needs {tuple(target.shape)}")
        if paired:
            halves = source.unflatten(0, (-1, 2, paired // 2))
            source = halves.transpose(1, 2).flatten(0, 2)
        target.copy_(source)

    def refuse_rest(self) -> None:
        if self._left:
            raise ValueError(f"{len(self._left)} tensors don't belong to this model, the first is {min(self._left)}")
