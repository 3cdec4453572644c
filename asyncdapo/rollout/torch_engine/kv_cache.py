"""KV cache: keys and values of every running sequence, one slot each.

A model has a cache of its own: how keys and values lie in memory depends on how they are summed. Times up to a
sequence's position are valid in its slot; later ones are left over from other sequences, and attention leaves them out.
Does not own: which sequence has which slot (`batch.py`).

`SdpaCache` is that of the PyTorch model: one buffer `[layer, slot, head, time, dim]`, in which heads are the key heads,
then the value heads of a layer, so that a token's keys and values are written at once.

Shapes: L layers, S slots, Q query heads, K key/value heads, T time, D head_dim, B slots in use, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from asyncdapo.rollout.torch_engine.checkpoint import ModelShape
from asyncdapo.rollout.torch_engine.workspace import Rows

TIME_STEP = 32
"""Caches hold, and attention reads, multiples of this many tokens."""

Span = tuple[int, int, int]
"""Slots [start, end) whose sequences all fit in the first `num_times` times of the cache."""

Attention = Callable[[int, Rows], torch.Tensor]
"""Writes a layer's keys and values of one token of each sequence, and attends with its queries: [B, Q * D]."""


def round_up(number: int, step: int = TIME_STEP) -> int:
    return -(-number // step) * step


class KVCache(Protocol):
    """What a prefill has computed, `kv`, is one tensor [L, N, …]. Only the model of this cache knows more of it."""

    num_times: int
    """Most tokens of a sequence."""

    def write(self, slots: np.ndarray, kv: torch.Tensor) -> None:
        """Copy what was computed for each of these slots, or for a prompt that they share."""
        ...

    def move(self, source: int, target: int, num_times: int) -> None:
        """Copy the first times of one slot to another."""


Views = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [slots, K, num_times, D] of each layer."""


class SdpaCache:
    """Keys and values of `num_slots` sequences of at most `num_times` tokens."""

    def __init__(
        self, shape: ModelShape, num_slots: int, num_times: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_times = round_up(num_times)
        self._num_kv_heads = shape.num_kv_heads
        sizes = (shape.num_layers, num_slots, 2 * shape.num_kv_heads, self.num_times, shape.head_dim)
        self._data = torch.zeros(sizes, dtype=dtype, device=device)
        self._flat = self._data.view(shape.num_layers, -1, shape.head_dim).unbind(0)
        self._first_SK = torch.arange(num_slots * 2 * shape.num_kv_heads, device=device).view(num_slots, -1)
        self._first_SK *= self.num_times
        self._times_T = torch.arange(self.num_times, device=device)
        self._views = lru_cache(maxsize=256)(self._make_views)

    def attention(self, positions_B: torch.Tensor, spans: Sequence[Span]) -> Attention:
        """Of one token of the slots 0 … B − 1, at these positions. It is valid for one pass through all layers."""
        places_BK = self._first_SK[: len(positions_B)] + positions_B.unsqueeze(1)
        views = [self._views(span) for span in spans]
        return partial(self._attend, places_BK, views, self._masks(positions_B, spans))

    def write(self, slots: np.ndarray, kv: torch.Tensor) -> None:
        """Keys and values are [L, N, 2 K, T, D]."""
        self._data[:, slots, :, : kv.shape[3]] = kv

    def move(self, source: int, target: int, num_times: int) -> None:
        self._data[:, target, :, :num_times] = self._data[:, source, :, :num_times]

    def _attend(
        self, places_BK: torch.Tensor, views: list[Views], masks: list[torch.Tensor], layer: int, rows: Rows
    ) -> torch.Tensor:
        self._flat[layer].index_put_((places_BK,), rows.kv_MKD)
        parts = [
            scaled_dot_product_attention(queries, *keys_values[layer], attn_mask=mask, scale=1.0)
            for queries, keys_values, mask in zip(rows.query_parts, views, masks, strict=True)
        ]
        torch.cat(parts, out=rows.attended_MKGD)
        return rows.attended_MQ

    def _masks(self, positions_B: torch.Tensor, spans: Sequence[Span]) -> list[torch.Tensor]:
        """Additive mask [slots, 1, 1, num_times] of each span: a token sees the times up to its own."""
        longest = max(num_times for _, _, num_times in spans)
        hidden_BT = self._times_T[:longest] > positions_B.unsqueeze(1)
        mask_BT = torch.zeros(hidden_BT.shape, dtype=self._data.dtype, device=self._data.device)
        mask_BT.masked_fill_(hidden_BT, float("-inf"))
        return [mask_BT[start:end, None, None, :num_times] for start, end, num_times in spans]

    def _make_views(self, span: Span) -> Views:
        """`_views` caches them: making one costs as much as a small sum, and the same spans repeat for many steps."""
        start, end, num_times = span
        kv_LBKTD = self._data[:, start:end, :, :num_times]
        num_heads = self._num_kv_heads
        return [(kv_BKTD[:, :num_heads], kv_BKTD[:, num_heads:]) for kv_BKTD in kv_LBKTD]
