"""SDPA cache: attention by `scaled_dot_product_attention`, a call for each span. For GPUs, and for bfloat16.

Owns one buffer `[layer, slot, head, time, dim]`; heads are the key heads, then the value heads of a layer, so that a
token's keys and values are written at once.

Shapes: see `kv_cache.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from asyncdapo.rollout.torch_engine.checkpoint import ModelShape
from asyncdapo.rollout.torch_engine.kv_cache import Attention, Span, round_up
from asyncdapo.rollout.torch_engine.workspace import Rows

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
        places_BK = self._first_SK[: len(positions_B)] + positions_B.unsqueeze(1)
        views = [self._views(span) for span in spans]
        return partial(self._attend, places_BK, views, self._masks(positions_B, spans))

    def write(self, start: int, end: int, kv_LNKTD: torch.Tensor) -> None:
        self._data[:, start:end, :, : kv_LNKTD.shape[3]] = kv_LNKTD

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
