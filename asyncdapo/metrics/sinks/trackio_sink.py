"""Trackio: the same names over train steps, in its local database (TRACKIO_DIR); `trackio show` shows them.

In: the metrics of each step. Out: a Trackio run, which a resumed run continues. Trackio deletes nothing: of a step that
was undone both lines are there, and `undone_by` marks it. Where it writes to, and what it prints, is Trackio's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from asyncdapo.metrics.jsonl import UNDONE_BY
from asyncdapo.metrics.samples import COLUMNS, Sample


class TrackioSink:
    """One Trackio run. `run_name`: unique in the project."""

    def __init__(self, project: str, run_name: str, settings: Mapping[str, Any]) -> None:
        trackio = import_module("trackio")  # by name: its types aren't where this extra isn't
        self._new_table = trackio.Table
        self._run = trackio.init(
            project, name=run_name, config=dict(settings), resume="allow", embed=False, auto_log_cpu=False
        )

    def log(self, metrics: Mapping[str, float]) -> None:
        numbers = {name: value for name, value in metrics.items() if name != "step"}
        self._run.log(numbers, step=int(metrics["step"]))

    def show_samples(self, samples: Sequence[Sample]) -> None:
        table = self._new_table(columns=list(COLUMNS), data=[sample.row() for sample in samples])
        self._run.log({"samples": table}, step=samples[0].step)

    def mark_undone(self, steps: Sequence[int], undone_by: int) -> None:
        for step in steps:
            self._run.log({UNDONE_BY: undone_by}, step=step)

    def close(self) -> None:
        self._run.finish()
