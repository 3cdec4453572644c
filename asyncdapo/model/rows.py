"""Rows: which part of a tensor a shard holds. One rule, for storage and for publishing. No torch here.

In: the length of the first dimension, and a shard's place. Out: its `Rows`. Invariant: FSDP2's rule, which is that of
`torch.chunk`: equal parts in order, the last ones smaller or empty.
"""

from __future__ import annotations

from typing import NamedTuple


class Rows(NamedTuple):
    """Of the first dimension, from `start` up to `end`; maybe none."""

    start: int
    end: int


def rows_of_shard(num_rows: int, shard: int, num_shards: int) -> Rows:
    """The rows of one of `num_shards` shards."""
    most = -(-num_rows // num_shards)
    return Rows(min(shard * most, num_rows), min((shard + 1) * most, num_rows))
