"""KV cache: keys and values of every running sequence, one slot each.

Owns one buffer `[layer, slot, head, time, dim]`; heads are the key heads, then the value heads of a layer, so that a
token's keys and values are written at once. Times up to a sequence's position are valid in its slot; later ones are
left over from other sequences, and the attention mask hides them. Does not own: which sequence has which slot
(`batch.py`).

Shapes: L layers, S slots, K key/value heads, T time, D head_dim, B slots in use, N sequences.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from asyncdapo.rollout.torch_engine.checkpoint import ModelShape

TIME_STEP = 32
"""Views of the cache are cut at multiples of this many tokens."""

Span = tuple[int, int, int]
"""Slots [start, end) whose sequences all fit in the first `num_times` times of the cache."""


def round_up(num_tokens: int) -> int:
    return -(-num_tokens // TIME_STEP) * TIME_STEP


class KVCache:
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
        self.views = lru_cache(maxsize=256)(self._make_views)

    def places(self, positions_B: torch.Tensor) -> torch.Tensor:
        """Where `put` writes the tokens of slots 0 … B − 1, which have these positions: [B, 2 K]."""
        return self._first_SK[: len(positions_B)] + positions_B.unsqueeze(1)

    def put(self, layer: int, places_BK: torch.Tensor, kv_BKD: torch.Tensor) -> None:
        """Keys and values [B, 2 K, D] of one token of each sequence."""
        self._flat[layer].index_put_((places_BK,), kv_BKD)

    def _make_views(self, span: Span) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [slots, K, num_times, D] of each layer, for attention.

        `views` caches them: making one costs as much as a small sum, and the same spans repeat for many steps.
        """
        start, end, num_times = span
        kv_LBKTD = self._data[:, start:end, :, :num_times]
        num_heads = self._num_kv_heads
        return [(kv_BKTD[:, :num_heads], kv_BKTD[:, num_heads:]) for kv_BKTD in kv_LBKTD]

    def write(self, start: int, end: int, kv_LNKTD: torch.Tensor) -> None:
        """Copy the first T times of slots [start, end) from `[L, 1 or end − start, 2 K, T, D]`."""
        self._data[:, start:end, :, : kv_LNKTD.shape[3]] = kv_LNKTD

    def move(self, source: int, target: int, num_times: int) -> None:
        """Copy the first times of one slot to another."""
        self._data[:, target, :, :num_times] = self._data[:, source, :, :num_times]
