"""The log-probs of a few completions under the weights that trained on them, for who looks at single tokens.

    FOLDER/000012.learner.npz      of step 12 and rank 0: {"GROUP.SAMPLE.CONTEXT": float32 [R]}

In: a batch, the rows of each forward pass with gradient and their log-probs. Out: a file of this rank, replaced if the
step is trained again; of each context the first pass in the step, NaN where a token bears no loss. Not synced: nothing
depends on it. Does not own: which completions are computed (`batches`), who reads the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from asyncdapo.disk import disk_errors
from asyncdapo.learner.batches.samples import Row
from asyncdapo.shares import Batch


class SampleLogprobs:
    """Of one train step."""

    def __init__(self, batch: Batch, num_groups: int) -> None:
        """`num_groups`: so many of its first ones."""
        names = [f"{group.lease_id}.{sample}" for group in batch.groups for sample in range(len(group.completions))]
        self._names = names[: sum(len(group.completions) for group in batch.groups[:num_groups])]
        self._step = batch.step
        self.found: dict[str, np.ndarray] = {}
        """By group, completion and context."""

    def note(self, rows: Sequence[Row], logp_BT: Tensor) -> None:
        """One forward pass."""
        for place, row in enumerate(rows):
            if row.index >= len(self._names):
                continue
            name = f"{self._names[row.index]}.{row.context}"
            if name not in self.found:
                logprobs = logp_BT[place, row.response].float().cpu().numpy()
                self.found[name] = np.where(row.loss_mask, logprobs, np.float32(np.nan))

    def write(self, folder: Path, process: str) -> None:
        """Replace the file of this process. Raises DiskError."""
        path = folder / f"{self._step:06d}.{process}.npz"
        with disk_errors(path):
            folder.mkdir(exist_ok=True)
            unfinished = path.with_suffix(".new")
            with unfinished.open("wb") as file:
                np.savez(file, **self.found)  # pyright: ignore[reportArgumentType] (the names are keys)
            unfinished.replace(path)
