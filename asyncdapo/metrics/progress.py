"""Progress lines: one aligned line a train step, and one for everything worth saying in between.

In: metrics, the current status, notes. Out: lines with the time of day, in RUN_DIR/run.log and on a standard output
that is no terminal. Does not own: the live view of a terminal (`terminal`), which shows the same `cells`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TextIO

MISSING = "-"


@dataclass(frozen=True)
class Column:
    """One number of a step as people read it."""

    title: str
    metric: str
    width: int
    show: Callable[[float], str]
    rare: bool = False
    """Left out of a line that has no number for it."""


def _decimals(value: float) -> str:
    return f"{value:.3f}"


def _thousands(value: float) -> str:
    return f"{value:,.0f}"


COLUMNS = (
    Column("reward", "reward/mean", 6, _decimals),
    Column("accuracy", "eval/accuracy", 5, _decimals),
    Column("rollout tok/s", "rollout/tokens_per_s", 7, _thousands),
    Column("learner tok/s", "learner/tokens_per_s", 7, _thousands),
    Column("staleness", "replay/staleness_mean", 4, lambda value: f"{value:.2f}"),
    Column("max", "replay/staleness_max", 2, _thousands),
    Column("queue", "replay/queued", 4, _thousands),
    Column("waiting", "learner/waiting_ratio", 4, lambda value: f"{value:.0%}"),
    Column("wall", "time/wall_s", 9, lambda value: f"{value:,.1f} s"),
    Column("greedy", "eval/greedy_accuracy", 5, _decimals, rare=True),
)
"""`accuracy` and `greedy` only stand in the line of the step in which an evaluation finished."""


def cells(metrics: Mapping[str, float]) -> list[str]:
    """The number of each column, or a dash where the step has none."""
    return [
        column.show(metrics[column.metric]) if math.isfinite(metrics.get(column.metric, math.nan)) else MISSING
        for column in COLUMNS
    ]


class ProgressLines:
    """Writes lines to a file or a pipe, each complete when the call returns."""

    def __init__(self, stream: TextIO, total_steps: int, now: Callable[[], datetime] = datetime.now) -> None:
        self._stream, self._total_steps, self._now = stream, total_steps, now
        self._status = ""

    def log(self, metrics: Mapping[str, float]) -> None:
        """The line of one step."""
        width = len(str(self._total_steps))
        fields = [
            f"{column.title} {cell:>{column.width}}"
            for column, cell in zip(COLUMNS, cells(metrics), strict=True)
            if cell != MISSING or not column.rare
        ]
        self.note("  ".join([f"step {metrics['step']:>{width}.0f}/{self._total_steps}", *fields]))
        self._status = ""

    def status(self, text: str) -> None:
        """What the run does or waits for now; the same is said once a step."""
        if text != self._status:
            self._status = text
            self.note(text)

    def note(self, text: str) -> None:
        """Something that happened."""
        self._stream.write(f"{self._now():%H:%M:%S}  {text}\n")
        self._stream.flush()

    def close(self) -> None:
        """The stream belongs to the caller and stays open."""
