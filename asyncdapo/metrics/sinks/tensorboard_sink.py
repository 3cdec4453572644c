"""TensorBoard: RUN_DIR/tensorboard, a series for each metric, over train steps.

In: the metrics of each step. Out: event files; each launch and each rollback begins another. A rollback hides the
undone steps from TensorBoard by its own mark, so a series shows each step once. TensorBoard keeps 32-bit numbers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from asyncdapo.metrics.samples import Sample, as_markdown

FOLDER = "tensorboard"

logger = logging.getLogger("metrics")


class TensorBoardSink:
    """Writes event files under RUN_DIR."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / FOLDER
        logger.info("TensorBoard shows it: tensorboard --logdir %s", os.path.relpath(folder))
        self._open = lambda purge_step: SummaryWriter(str(folder), purge_step=purge_step)
        self._writer: SummaryWriter = self._open(None)

    def log(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(metrics["step"]))
        self._writer.flush()

    def show_samples(self, samples: Sequence[Sample]) -> None:
        self._writer.add_text("samples", as_markdown(samples), samples[0].step)

    def mark_undone(self, steps: Sequence[int], undone_by: int) -> None:
        self._writer.close()
        self._writer = self._open(steps[0])

    def close(self) -> None:
        self._writer.close()
