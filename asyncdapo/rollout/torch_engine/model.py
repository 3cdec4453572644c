"""Model: the forward pass of a llama-family decoder, for whole prompts and for one token of many sequences.

In: fused weights, token ids, positions, a KV cache. Out: logits of the next token in float32; `decode` also writes the
token's keys and values into its slot. Keeps no state between calls and draws nothing.

Query heads that share a key/value head are rows of one attention problem, so keys and values are never repeated. Keys
and queries of a head are stored as P rotated pairs (see `weights.py`).

Shapes: B sequences that decode, N prompts, M tokens (B, or N * T), T time, H hidden, Q query heads, K key/value heads,
G = Q / K query heads of one key/value head, D head_dim, P = D / 2 rotated pairs, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from asyncdapo.rollout.torch_engine.checkpoint import Checkpoint
from asyncdapo.rollout.torch_engine.kv_cache import KVCache, Span
from asyncdapo.rollout.torch_engine.weights import LayerWeights, Weights


class Model:
    """Computes; the weights are an argument of every call, since they change while sequences run."""

    def __init__(self, checkpoint: Checkpoint, num_positions: int, device: torch.device) -> None:
        self._shape = checkpoint.shape
        self._num_rotated = self._shape.num_heads + self._shape.num_kv_heads
        self._norm_scale = self._shape.hidden_size**-0.5
        self._norm_root = torch.tensor(self._shape.norm_eps**0.5, device=device)
        self._times_T = torch.arange(num_positions, device=device)
        angles_TP = torch.outer(torch.arange(num_positions, dtype=torch.float32), checkpoint.frequencies_P)
        magnitudes_TP = torch.full_like(angles_TP, checkpoint.rotation_scale)
        self._rotations_TP = torch.polar(magnitudes_TP, angles_TP).to(device)

    def decode(
        self, weights: Weights, cache: KVCache, tokens_B: torch.Tensor, positions_B: torch.Tensor, spans: Sequence[Span]
    ) -> torch.Tensor:
        """Logits [B, V] after token b of the sequence in slot b, which stands at `positions_B[b]`.

        `spans` cover the slots 0 … B − 1 in order.
        """
        sizes = [end - start for start, end, _ in spans]
        views = [cache.views(span) for span in spans]
        masks = self._masks(positions_B, spans, weights.norm.dtype)
        places_BK = cache.places(positions_B)
        rotations_B1P = self._rotations_TP[positions_B].unsqueeze(1)
        x_BH = embedding(tokens_B, weights.embedding)
        for index, layer in enumerate(weights.layers):
            q_BQD, kv_BKD = self._project(layer, x_BH, rotations_B1P)
            cache.put(index, places_BK, kv_BKD)
            q_BKGD = q_BQD.view(len(tokens_B), self._shape.num_kv_heads, -1, self._shape.head_dim)
            parts = [
                scaled_dot_product_attention(q, *keys_values[index], attn_mask=mask)
                for q, keys_values, mask in zip(q_BKGD.split(sizes), views, masks, strict=True)
            ]
            attended_BKGD = torch.cat(parts) if len(parts) > 1 else parts[0]
            self._mix(layer, x_BH, attended_BKGD.flatten(1))
        return self._logits(weights, x_BH)

    def prefill(
        self, weights: Weights, tokens_NT: torch.Tensor, lengths_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, V] after the last token of each prompt, and keys and values [L, N, 2 K, T, D] of all of them.

        Prompts are padded on the right; what stands at padded times means nothing.
        """
        num_kv_heads, (num_prompts, num_times) = self._shape.num_kv_heads, tokens_NT.shape
        rotations_M1P = self._rotations_TP[:num_times].repeat(num_prompts, 1).unsqueeze(1)
        x_MH = embedding(tokens_NT.flatten(), weights.embedding)
        kv_LNKTD = x_MH.new_empty(len(weights.layers), num_prompts, 2 * num_kv_heads, num_times, self._shape.head_dim)
        for layer, kv_NKTD in zip(weights.layers, kv_LNKTD, strict=True):
            q_MQD, kv_MKD = self._project(layer, x_MH, rotations_M1P)
            kv_NKTD.copy_(kv_MKD.unflatten(0, (num_prompts, num_times)).transpose(1, 2))
            attended_NQTD = scaled_dot_product_attention(
                q_MQD.unflatten(0, (num_prompts, num_times)).transpose(1, 2),
                kv_NKTD[:, :num_kv_heads],
                kv_NKTD[:, num_kv_heads:],
                is_causal=True,
                enable_gqa=True,
            )
            self._mix(layer, x_MH, attended_NQTD.transpose(1, 2).flatten(2).flatten(0, 1))
        last_N = torch.arange(num_prompts, device=tokens_NT.device) * num_times + lengths_N - 1
        return self._logits(weights, x_MH[last_N]), kv_LNKTD

    def _project(
        self, layer: LayerWeights, x_MH: torch.Tensor, rotations_M1P: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries [M, Q, D]; rotated keys and then values [M, 2 K, D]."""
        shape = self._shape
        qkv = linear(self._norm(x_MH, layer.attention_norm), layer.qkv, layer.qkv_bias)
        qkv_MRD = qkv.view(len(x_MH), -1, shape.head_dim)
        rotated = qkv_MRD[:, : self._num_rotated]
        if layer.qk_norm is not None:
            rotated.copy_(rms_norm(rotated, (shape.head_dim,), None, shape.norm_eps).mul_(layer.qk_norm))
        pairs = torch.view_as_complex(rotated.float().view(len(x_MH), self._num_rotated, -1, 2))
        pairs.mul_(rotations_M1P)
        if rotated.dtype != torch.float32:
            rotated.copy_(torch.view_as_real(pairs).flatten(2))
        return qkv_MRD[:, : shape.num_heads], qkv_MRD[:, shape.num_heads :]

    def _mix(self, layer: LayerWeights, x_MH: torch.Tensor, attended: torch.Tensor) -> None:
        """Add the attention's output and then the MLP's to the residual stream, in place."""
        _add_linear(x_MH, attended, layer.out, layer.out_bias)
        gate, up = linear(self._norm(x_MH, layer.mlp_norm), layer.gate_up, layer.gate_up_bias).chunk(2, dim=1)
        _add_linear(x_MH, silu(gate).mul_(up), layer.down, layer.down_bias)

    def _logits(self, weights: Weights, x_MH: torch.Tensor) -> torch.Tensor:
        return linear(self._norm(x_MH, weights.norm), weights.head).float()

    def _masks(self, positions_B: torch.Tensor, spans: Sequence[Span], dtype: torch.dtype) -> list[torch.Tensor]:
        """Additive mask [slots, 1, 1, num_times] of each span: a token sees the times up to its own."""
        longest = max(num_times for _, _, num_times in spans)
        hidden_BT = self._times_T[:longest] > positions_B.unsqueeze(1)
        mask_BT = torch.zeros(hidden_BT.shape, dtype=dtype, device=positions_B.device)
        mask_BT.masked_fill_(hidden_BT, float("-inf"))
        return [mask_BT[start:end, None, None, :num_times] for start, end, num_times in spans]

    def _norm(self, x_MH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        """RMS norm, x / √(|x|² / H + ε). `rms_norm` is one kernel on a GPU, and on a CPU twice as many as these."""
        if x_MH.is_cuda:
            return rms_norm(x_MH, weight_H.shape, weight_H, self._shape.norm_eps)
        roots_M1 = torch.linalg.vector_norm(x_MH, dim=1, keepdim=True, dtype=torch.float32).mul_(self._norm_scale)
        return (x_MH / roots_M1.hypot_(self._norm_root)).mul_(weight_H).to(x_MH.dtype)


def _add_linear(x_MH: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    x_MH.addmm_(inputs, weight)
    if bias is not None:
        x_MH.add_(bias)
