"""A batch that is ready for its train step.

In: `Learner.prepare` makes it, in any thread, while another batch is trained. Out: `Learner.train` takes it. Invariant:
it depends on batch, payload and config alone, not on weights, so it may be made at any time. Does not own: whether the
batch may be trained on (its order and its staleness), which `train` checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncdapo.learner.batches.samples import Columns, Row
from asyncdapo.shares import Batch


@dataclass(frozen=True)
class Prepared:
    """One rank's share of a batch."""

    batch: Batch
    rows: Sequence[Sequence[Row]]
    """Those of this rank, for each optimizer update."""
    columns: Columns
    """Of all completions of the batch."""
