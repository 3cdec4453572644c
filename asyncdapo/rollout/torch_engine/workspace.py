"""Workspace: the buffers that every layer of a forward pass computes in.

Buffers and their views are made once and reused, so that they stay in the processor's cache: a decode step is so small
that allocations and new views would cost noticeable time. Holds no values between two layers.

Shapes: M tokens, H hidden, I intermediate, R = Q + 2 K query, key and value heads, K key/value heads, G = Q / K query
heads of one key/value head, D head_dim, P = D / 2 rotated pairs.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from asyncdapo.rollout.torch_engine.checkpoint import ModelShape


class Rows:
    """Views of a workspace for the tokens of one pass. Attention computes them in parts of `sizes` tokens."""

    def __init__(self, workspace: Workspace, sizes: tuple[int, ...]) -> None:
        shape, num_rows = workspace.shape, sum(sizes)
        num_rotated = shape.num_heads + shape.num_kv_heads
        self.heads_MR = workspace.heads[:num_rows]
        heads_MRD = self.heads_MR.view(num_rows, -1, shape.head_dim)
        self.queries_MQD = heads_MRD[:, : shape.num_heads]
        self.rotated_MRD = heads_MRD[:, :num_rotated]
        self.kv_MKD = heads_MRD[:, shape.num_heads :]
        grouped_MKGD = self.queries_MQD.view(num_rows, shape.num_kv_heads, -1, shape.head_dim)
        self.query_parts = grouped_MKGD.split(sizes)
        self.attended_MKGD = workspace.attended[:num_rows].view_as(grouped_MKGD)
        self.attended_MQ = workspace.attended[:num_rows]
        self.gate_up_MI = workspace.gate_up[:num_rows]
        self.gate_MI, self.up_MI = self.gate_up_MI.chunk(2, dim=1)
        self._pairs_MRP = _pairs(self.rotated_MRD) if workspace.heads.dtype == torch.float32 else None

    def rotate(self, rotations_M1P: torch.Tensor) -> None:
        """Rotate every pair of every query and key by its token's angle, in float32."""
        if self._pairs_MRP is not None:
            self._pairs_MRP.mul_(rotations_M1P)
        else:
            pairs_MRP = _pairs(self.rotated_MRD.float()).mul_(rotations_M1P)
            self.rotated_MRD.copy_(torch.view_as_real(pairs_MRP).flatten(2))


class Workspace:
    """Buffers for at most `num_rows` tokens; `rows(sizes)` are views for sum(sizes) of them."""

    def __init__(self, shape: ModelShape, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        num_heads = shape.num_heads + 2 * shape.num_kv_heads
        self.heads = torch.empty(num_rows, num_heads * shape.head_dim, dtype=dtype, device=device)
        self.attended = torch.empty(num_rows, shape.num_heads * shape.head_dim, dtype=dtype, device=device)
        self.gate_up = torch.empty(num_rows, 2 * shape.intermediate_size, dtype=dtype, device=device)
        self.rows = lru_cache(maxsize=64)(self._make_rows)

    def _make_rows(self, sizes: tuple[int, ...]) -> Rows:
        return Rows(self, sizes)


def _pairs(heads_MRD: torch.Tensor) -> torch.Tensor:
    """Neighbouring dims as one complex number, a view [M, R, P]."""
    return torch.view_as_complex(heads_MRD.view(*heads_MRD.shape[:2], -1, 2))
