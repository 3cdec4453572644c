"""A batch made ready for its train step, by host work that needs no weights.

In: `Learner.prepare`, in any thread, while another step is trained. Out: what `Learner.train` goes on from. Invariant:
it depends on batch, payload and config alone, so it may be made at any time. Does not own: whether the batch may be
trained on (its order and its staleness), which `train` checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncdapo.learner.batches.samples import Columns, Row
from asyncdapo.messages import Batch


@dataclass(frozen=True)
class Prepared:
    """One rank's share of a batch."""

    batch: Batch
    rows: Sequence[Sequence[Row]]
    """Those of this rank, of each optimizer update."""
    columns: Columns
    """Of all completions of the batch."""
