"""KV cache: keys and values of every running sequence, one slot each.

Owns one buffer `[layer, slot, head, time, dim]`; heads are the key heads, then the value heads of a layer, so that a
token's keys and values are written at once. Times up to a sequence's position are valid in its slot, what lies beyond
is left over from others and hidden by the attention mask. Does not own: who sits in which slot (`batch.py`).

Shapes: L layers, S slots, K key/value heads, T time, D head_dim, B slots in use, N prompts.
"""

from __future__ import annotations

import torch

from asyncdapo.rollout.torch_engine.checkpoint import ModelShape

TIME_STEP = 32
"""Views of the cache are cut at multiples of this many tokens."""


def round_up(num_tokens: int) -> int:
    return -(-num_tokens // TIME_STEP) * TIME_STEP


class KVCache:
    """`layers[l]` is a view `[S, 2 K, T, D]` of layer l."""

    def __init__(
        self, shape: ModelShape, num_slots: int, num_times: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_times = round_up(num_times)
        self._data = torch.zeros(
            (shape.num_layers, num_slots, 2 * shape.num_kv_heads, self.num_times, shape.head_dim),
            dtype=dtype,
            device=device,
        )
        self.layers = list(self._data.unbind(0))

    def write(self, slots: list[int], kv_LNKTD: torch.Tensor) -> None:
        """Copy the first T times of these slots from `[L, 1 or len(slots), 2 K, T, D]`."""
        index = torch.tensor(slots, device=self._data.device)
        self._data[:, index, :, : kv_LNKTD.shape[3]] = kv_LNKTD

    def move(self, sources: list[int], targets: list[int], num_times: int) -> None:
        """Copy the first `num_times` times from slots to slots, all read before any is written."""
        source = torch.tensor(sources, device=self._data.device)
        target = torch.tensor(targets, device=self._data.device)
        self._data[:, target, :, :num_times] = self._data[:, source, :, :num_times]
