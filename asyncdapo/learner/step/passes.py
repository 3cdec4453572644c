"""Passes: the micro-batches of every rank, as many at each.

Forward and backward passes of sharded weights are collectives, so the ranks agree on their number before the first one.
A rank with fewer micro-batches makes empty passes, which count nothing (`packing.IDLE`). Does not own: which rows share
a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncdapo.learner.batches.samples import Row
from asyncdapo.learner.model.packing import micro_batches
from asyncdapo.learner.step.ranks import Ranks


def passes(rows: Sequence[Row], max_tokens: int, ranks: Ranks, *, at_least: int = 0) -> list[list[Row]]:
    """The rows of this rank in micro-batches of at most `max_tokens` computed tokens, and empty lists behind them: as
    many as the rank with the most has, and `at_least` so many. Every rank has to call it."""
    chunks = micro_batches(rows, max_tokens)
    num_passes = max(ranks.largest(len(chunks)), at_least)
    return chunks + [[] for _ in range(num_passes - len(chunks))]
