"""Model: the forward pass of a llama-family decoder, for whole prompts and for one token of many sequences.

In: fused weights, token ids, positions, a KV cache. Out: logits of the next token in float32; `decode` also writes the
token's keys and values into its slot. Keeps no state between calls and draws nothing.

Query heads that share a key/value head are rows of one attention problem, so keys and values are never repeated. Keys
and queries of a head are stored as P rotated pairs (see `weights.py`).

Shapes: B sequences that decode, N prompts, M tokens (B, or N * T), T time, H hidden, Q query heads, K key/value heads,
G = Q / K query heads of one key/value head, D head_dim, P = D / 2 rotated pairs, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from asyncdapo.rollout.torch_engine.batch import Batch
from asyncdapo.rollout.torch_engine.checkpoint import Checkpoint
from asyncdapo.rollout.torch_engine.kv_cache import KVCache, SdpaCache
from asyncdapo.rollout.torch_engine.sampling import draw
from asyncdapo.rollout.torch_engine.weights import LayerWeights, Weights
from asyncdapo.rollout.torch_engine.workspace import Rows, Workspace


class Model(Protocol):
    """Computes; the weights are an argument of every call, since they change while sequences run."""

    @property
    def device(self) -> torch.device: ...

    @property
    def cache(self) -> KVCache: ...

    def new_weights(self) -> Weights:
        """A set of weights to be filled, of the kind that this model computes with."""
        ...

    def decode(self, weights: Any, batch: Batch) -> torch.Tensor:
        """Logits [B, V] after the last token of the first B slots, those in use and perhaps more. They are valid until
        the next call."""
        ...

    def prefill(
        self, weights: Any, tokens_NT: torch.Tensor, lengths_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, V] after the last token of each prompt, and keys and values `[L, N, …]` for the cache.

        Prompts are padded on the right; keys and values at padded times are meaningless.
        """
        ...

    def sample(self, logits_BV: torch.Tensor, batch: Batch, slots: np.ndarray) -> float:
        """Draw the next token of each of these slots (see `sampling.draw`) and append it. Returns the sum of the
        log-probs."""
        ...


def rotations(checkpoint: Checkpoint, num_positions: int) -> torch.Tensor:
    """Complex factors [T, P] of the pairs at each position. Queries and keys are both rotated, so each carries half of
    the 1 / √D that scores are scaled by."""
    angles_TP = torch.outer(torch.arange(num_positions, dtype=torch.float32), checkpoint.frequencies_P)
    scale = checkpoint.rotation_scale * checkpoint.shape.head_dim**-0.25
    return torch.polar(torch.full_like(angles_TP, scale), angles_TP)


class TorchModel:
    """The model by PyTorch's operations, on any device and in any number format."""

    def __init__(
        self, checkpoint: Checkpoint, num_slots: int, max_times: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.device, self._dtype, self._shape = device, dtype, checkpoint.shape
        self.cache = SdpaCache(self._shape, num_slots, max_times, dtype, device)
        self._rotations_TP = rotations(checkpoint, self.cache.num_times).to(device)
        self._workspace = Workspace(self._shape, num_slots, dtype, device)

    def new_weights(self) -> Weights:
        return Weights(self._shape, self._dtype, self.device)

    def decode(self, weights: Weights, batch: Batch) -> torch.Tensor:
        spans = batch.spans()
        end = spans[-1][1]
        tokens_B, positions_B = self._on_device(batch.token[:end]), self._on_device(batch.position[:end])
        rows = self._workspace.rows(tuple(end - start for start, end, _ in spans))
        attend = self.cache.attention(positions_B, spans)
        rotations_B1P = self._rotations_TP[positions_B].unsqueeze(1)
        x_BH = embedding(tokens_B, weights.embedding)
        for index, layer in enumerate(weights.layers):
            self._project(layer, x_BH, rotations_B1P, rows)
            self._mix(layer, x_BH, attend(index, rows), rows)
        return linear(self._norm(x_BH, weights.norm), weights.head).float()

    def prefill(
        self, weights: Weights, tokens_NT: torch.Tensor, lengths_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape, (num_prompts, num_times) = self._shape, tokens_NT.shape
        rows = Workspace(shape, num_prompts * num_times, self._dtype, self.device).rows((num_prompts * num_times,))
        rotations_M1P = self._rotations_TP[:num_times].repeat(num_prompts, 1).unsqueeze(1)
        x_MH = embedding(tokens_NT.flatten(), weights.embedding)
        kv_LNKTD = x_MH.new_empty(shape.num_layers, num_prompts, 2 * shape.num_kv_heads, num_times, shape.head_dim)
        queries_NQTD = rows.queries_MQD.unflatten(0, (num_prompts, num_times)).transpose(1, 2)
        kv_NTKD = rows.kv_MKD.unflatten(0, (num_prompts, num_times))
        attended_NTQD = rows.attended_MQ.view(num_prompts, num_times, shape.num_heads, shape.head_dim)
        for layer, kv_NKTD in zip(weights.layers, kv_LNKTD, strict=True):
            self._project(layer, x_MH, rotations_M1P, rows)
            kv_NKTD.copy_(kv_NTKD.transpose(1, 2))
            keys_NKTD, values_NKTD = kv_NKTD.chunk(2, dim=1)
            attended_NQTD = scaled_dot_product_attention(
                queries_NQTD, keys_NKTD, values_NKTD, is_causal=True, scale=1.0, enable_gqa=True
            )
            attended_NTQD.copy_(attended_NQTD.transpose(1, 2))
            self._mix(layer, x_MH, rows.attended_MQ, rows)
        last_N = torch.arange(num_prompts, device=self.device) * num_times + lengths_N - 1
        return linear(self._norm(x_MH, weights.norm)[last_N], weights.head).float(), kv_LNKTD

    def sample(self, logits_BV: torch.Tensor, batch: Batch, slots: np.ndarray) -> float:
        greedy = batch.greedy[slots]
        tokens_B, logprobs_B = draw(
            logits_BV,
            self._on_device(batch.temperature[slots]),
            self._on_device(batch.next_uniforms(slots)),
            greedy_B=self._on_device(greedy) if greedy.any() else None,
        )
        logprobs = logprobs_B.cpu().numpy()
        batch.append(slots, tokens_B.cpu().numpy(), logprobs)
        return float(logprobs.sum())

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _project(self, layer: LayerWeights, x_MH: torch.Tensor, rotations_M1P: torch.Tensor, rows: Rows) -> None:
        """Write the rotated queries and keys, and the values, of the next attention into the workspace."""
        _linear(self._norm(x_MH, layer.attention_norm), layer.qkv, layer.qkv_bias, rows.heads_MR)
        if layer.qk_norm is not None:
            normed_MRD = rms_norm(rows.rotated_MRD, (self._shape.head_dim,), None, self._shape.norm_eps)
            torch.mul(normed_MRD, layer.qk_norm, out=rows.rotated_MRD)
        rows.rotate(rotations_M1P)

    def _mix(self, layer: LayerWeights, x_MH: torch.Tensor, attended_MQ: torch.Tensor, rows: Rows) -> None:
        """Add the attention's output and then the MLP's to the residual stream, in place."""
        _add_linear(x_MH, attended_MQ, layer.out, layer.out_bias)
        _linear(self._norm(x_MH, layer.mlp_norm), layer.gate_up, layer.gate_up_bias, rows.gate_up_MI)
        _add_linear(x_MH, silu(rows.gate_MI, inplace=True).mul_(rows.up_MI), layer.down, layer.down_bias)

    def _norm(self, x_MH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_MH, weight_H.shape, weight_H, self._shape.norm_eps)


def _linear(x_MI: torch.Tensor, weight_IO: torch.Tensor, bias_O: torch.Tensor | None, out_MO: torch.Tensor) -> None:
    if bias_O is None:
        torch.mm(x_MI, weight_IO, out=out_MO)
    else:
        torch.addmm(bias_O, x_MI, weight_IO, out=out_MO)


def _add_linear(
    x_MO: torch.Tensor, inputs_MI: torch.Tensor, weight_IO: torch.Tensor, bias_O: torch.Tensor | None
) -> None:
    x_MO.addmm_(inputs_MI, weight_IO)
    if bias_O is not None:
        x_MO.add_(bias_O)
