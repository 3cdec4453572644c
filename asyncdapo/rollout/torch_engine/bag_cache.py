"""Bag cache: attention of one token of many sequences, as a CPU does it fastest. For float32.

Its products are too small for matrix kernels. But both of its halves are weighted sums of rows, and an embedding bag
takes thousands of those in one vectorised pass. Keys lie with time last, in chunks: a query's D numbers weigh the D
rows of a chunk, and the sum is C scores. A query's probabilities weigh one row of values for each time.

Owns keys `[layer, chunk, dim, time]` and values `[layer, chunk, time, dim]`, where the chunks are numbered by slot,
key/value head, and time. Sums for different sequences don't mix, so a sample doesn't depend on the others.

Shapes: as in `kv_cache.py`; C times in a chunk, R query, key and value heads, A chunks to attend to: each counts once
for every query head that reads it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache, partial

import torch
from torch.nn.functional import pad

from asyncdapo.rollout.torch_engine.checkpoint import ModelShape
from asyncdapo.rollout.torch_engine.kv_cache import TIME_STEP, Attention, Span, round_up
from asyncdapo.rollout.torch_engine.workspace import Rows

CHUNK = TIME_STEP


class BagCache:
    """Keys and values of `num_slots` sequences of at most `num_times` tokens."""

    def __init__(self, shape: ModelShape, num_slots: int, num_times: int) -> None:
        self.num_times = round_up(num_times)
        self._num_kv_heads = shape.num_kv_heads
        num_chunks = self.num_times // CHUNK
        slots = (shape.num_layers, num_slots, shape.num_kv_heads, num_chunks)
        self._keys = _zeros(*slots, shape.head_dim, CHUNK)
        self._values = _zeros(*slots, CHUNK, shape.head_dim)
        self._key_chunks = self._keys.mT.flatten(1, 3).unbind()
        self._value_chunks = self._values.flatten(1, 3).unbind()
        self._key_rows = self._keys.flatten(1, 4).unbind()
        self._value_rows = self._values.flatten(1, 4).unbind()
        self._first_chunk_SK = torch.arange(num_slots * shape.num_kv_heads).view(num_slots, -1) * num_chunks
        self._masks_VC = torch.full((CHUNK + 1, CHUNK), float("-inf")).triu()  # V of the C times are visible
        self._plan = lru_cache(maxsize=4)(partial(_Plan, shape, num_chunks))

    def attention(self, positions_B: torch.Tensor, spans: Sequence[Span]) -> Attention:
        plan = self._plan(tuple(spans))
        plan.start(positions_B, self._masks_VC)
        chunks_BK = self._first_chunk_SK[: len(positions_B)] + (positions_B // CHUNK).unsqueeze(1)
        times_BK = (positions_B % CHUNK).unsqueeze(1).expand_as(chunks_BK)
        return partial(self._attend, plan, (chunks_BK, times_BK))

    def write(self, start: int, end: int, kv_LNKTD: torch.Tensor) -> None:
        chunks = pad(kv_LNKTD, (0, 0, 0, -kv_LNKTD.shape[3] % CHUNK)).unflatten(3, (-1, CHUNK))
        keys, values = chunks.chunk(2, dim=2)
        self._keys[:, start:end, :, : chunks.shape[3]] = keys.mT.contiguous()
        self._values[:, start:end, :, : chunks.shape[3]] = values

    def move(self, source: int, target: int, num_times: int) -> None:
        num_chunks = round_up(num_times) // CHUNK
        self._keys[:, target, :, :num_chunks] = self._keys[:, source, :, :num_chunks]
        self._values[:, target, :, :num_chunks] = self._values[:, source, :, :num_chunks]

    def _attend(self, plan: _Plan, places: tuple[torch.Tensor, torch.Tensor], layer: int, rows: Rows) -> torch.Tensor:
        self._key_chunks[layer].index_put_(places, rows.kv_MKD[:, : self._num_kv_heads])
        self._value_chunks[layer].index_put_(places, rows.kv_MKD[:, self._num_kv_heads :])
        torch.index_select(rows.heads_RD, 0, plan.queries_A, out=plan.queries_AD)
        scores_AC = _bags(self._key_rows[layer], plan.key_rows_AD, plan.key_bags, plan.queries_AD)
        torch.add(scores_AC, plan.mask_AC, out=plan.scores_AC)
        for scores_XT, probs_XT in plan.parts:
            torch.softmax(scores_XT, -1, out=probs_XT)
        attended = _bags(self._value_rows[layer], plan.value_rows_AC, plan.value_bags, plan.probs_AC)
        return attended.view(rows.attended_MQ.shape)


class _Plan:
    """What to sum for these spans: the rows of each bag, and the buffers between the two halves.

    Made once, since the same spans repeat for many steps; `start` sets what depends on the positions.
    """

    def __init__(self, shape: ModelShape, num_chunks: int, spans: tuple[Span, ...]) -> None:
        num_heads, head_dim = shape.num_heads, shape.head_dim
        heads_Q = torch.arange(num_heads)
        to_attend = [
            torch.cartesian_prod(torch.arange(start, end), heads_Q, torch.arange(num_times // CHUNK))
            for start, end, num_times in spans
        ]
        self._slots_A, heads_A, self._chunks_A = torch.cat(to_attend).int().unbind(1)
        kv_heads_A = heads_A // (num_heads // shape.num_kv_heads)
        self._first_chunk_A = (self._slots_A * shape.num_kv_heads + kv_heads_A) * num_chunks
        self._dims_D = torch.arange(head_dim, dtype=torch.int32)
        self._times_C = torch.arange(CHUNK, dtype=torch.int32)
        num_to_attend = len(heads_A)
        self.queries_A = self._slots_A * (num_heads + 2 * shape.num_kv_heads) + heads_A
        self.key_rows_AD = torch.empty(num_to_attend, head_dim, dtype=torch.int32)
        self.value_rows_AC = torch.empty(num_to_attend, CHUNK, dtype=torch.int32)
        self.key_bags = torch.arange(0, self.key_rows_AD.numel() + 1, head_dim, dtype=torch.int32)
        times, sizes = [span[2] for span in spans], [(end - start) * num_heads for start, end, _ in spans]
        lengths = torch.repeat_interleave(torch.tensor(times), torch.tensor(sizes))
        self.value_bags = pad(lengths.cumsum(0), (1, 0)).int()
        self.queries_AD = torch.empty(num_to_attend, head_dim)
        self.mask_AC, self.scores_AC, self.probs_AC = torch.empty(3, num_to_attend, CHUNK)
        parts = [size * num_times for size, num_times in zip(sizes, times, strict=True)]
        scores, probs = self.scores_AC.view(-1).split(parts), self.probs_AC.view(-1).split(parts)
        self.parts = [(s.view(-1, t), p.view(-1, t)) for s, p, t in zip(scores, probs, times, strict=True)]
        """Scores and probabilities of each span: a row per query, all of its times."""

    def start(self, positions_B: torch.Tensor, masks_VC: torch.Tensor) -> None:
        """Chunks behind a sequence's position are masked; instead of them the last one is read again, since it's at
        hand in the processor's cache."""
        positions_A = positions_B.int().index_select(0, self._slots_A)
        chunks_A1 = torch.minimum(self._chunks_A, positions_A // CHUNK).add_(self._first_chunk_A).unsqueeze(1)
        torch.add(chunks_A1 * len(self._dims_D), self._dims_D, out=self.key_rows_AD)
        torch.add(chunks_A1 * CHUNK, self._times_C, out=self.value_rows_AC)
        num_visible_A = (positions_A + 1).sub_(self._chunks_A, alpha=CHUNK).clamp_(0, CHUNK)
        torch.index_select(masks_VC, 0, num_visible_A, out=self.mask_AC)


def _bags(rows: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of rows: bag i has the indices and weights from `offsets[i]` to `offsets[i + 1]`."""
    return torch.embedding_bag(
        rows, indices.view(-1), offsets, per_sample_weights=weights.view(-1), include_last_offset=True
    )[0]


def _zeros(*sizes: int) -> torch.Tensor:
    """In huge pages where the system has them: the rows of a bag are far apart, and each on a page of its own would
    need an entry of the processor's table of pages."""
    num_bytes = 4 * torch.Size(sizes).numel()
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(sizes)
