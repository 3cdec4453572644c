"""KV cache: what the model and the runner ask of a cache; `bag_cache.py` and `sdpa_cache.py` are the two there are.

A cache holds keys and values of every running sequence, one slot each, and attends to them: how they lie in memory
depends on how they are summed. Times up to a sequence's position are valid in its slot; later ones are left over from
other sequences, and the attention mask hides them. Does not own: which sequence has which slot (`batch.py`).

Shapes: L layers, S slots, Q query heads, K key/value heads, T time, D head_dim, B slots in use, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from asyncdapo.rollout.torch_engine.workspace import Rows

TIME_STEP = 32
"""Attention reads multiples of this many tokens."""

Span = tuple[int, int, int]
"""Slots [start, end) whose sequences all fit in the first `num_times` times of the cache."""

Attention = Callable[[int, Rows], torch.Tensor]
"""Writes a layer's keys and values of one token of each sequence, and attends with its queries: [B, Q * D]."""


def round_up(num_tokens: int) -> int:
    return -(-num_tokens // TIME_STEP) * TIME_STEP


class KVCache(Protocol):
    """Queries and keys come scaled: their product is the score."""

    num_times: int
    """Most tokens of a sequence."""

    def attention(self, positions_B: torch.Tensor, spans: Sequence[Span]) -> Attention:
        """Of one token of the slots 0 … B − 1, at these positions. It is valid for one pass through all layers."""
        ...

    def write(self, start: int, end: int, kv_LNKTD: torch.Tensor) -> None:
        """Copy the first T times of slots [start, end) from `[L, 1 or end − start, 2 K, T, D]`."""

    def move(self, source: int, target: int, num_times: int) -> None:
        """Copy the first times of one slot to another."""
