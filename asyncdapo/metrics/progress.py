"""Progress lines: one short line for each train step, and one for each note in between.

In: metrics, the current status, notes. Out: lines with the time of day, in RUN_DIR/run.log, and on standard output if
it isn't a terminal. Does not own: the live view on a terminal (`terminal`), which shows the same `COLUMNS`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean
from typing import TextIO

from asyncdapo.metrics.verdict.running_verdict import verdict_of
from asyncdapo.metrics.verdict.verdict import BALANCED, UNSURE

NUM_RECENT_STEPS = 12
"""Whose time says how long the others will take."""


@dataclass(frozen=True)
class Column:
    """One number of a step, formatted for people."""

    title: str
    metric: str
    width: int
    show: Callable[[float], str]
    label: str | None = ""
    """Its name in a line if it isn't the title; None leaves it out of lines."""
    only_above_0: bool = False

    def cell(self, metrics: Mapping[str, float]) -> str:
        """The number; empty if the step has none, a dash if it isn't finite."""
        value = metrics.get(self.metric)
        if value is None or (self.only_above_0 and not value > 0):
            return ""
        return self.show(value) if math.isfinite(value) else "-"


class VerdictColumn(Column):
    """What limits the run."""

    def cell(self, metrics: Mapping[str, float]) -> str:
        verdict = verdict_of(metrics)
        return {BALANCED: "none", UNSURE: "unsure"}.get(verdict.limit, verdict.limit) if verdict else ""


def _decimals(value: float) -> str:
    return f"{value:.3f}"


def thousands(value: float) -> str:
    """A whole number, by thousands."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """A share as a whole number of percent."""
    return f"{value:.0%}"


def clock(seconds: float) -> str:
    """Minutes and seconds, after hours if there are any."""
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return (f"{hours}:{minutes % 60:02}" if hours else f"{minutes}") + f":{round(seconds) % 60:02}"


COLUMNS = (
    Column("reward", "reward/mean", 6, _decimals),
    Column("rollout tok/s", "rollout/tokens_per_s", 6, thousands, label="tok/s"),
    Column("learner tok/s", "learner/tokens_per_s", 6, thousands, label="/"),
    Column("staleness", "replay/staleness_mean", 4, lambda value: f"{value:.2f}", label="stale"),
    VerdictColumn("limit", "verdict/overlap_ratio", 8, percent),
    Column("wall", "time/wall_s", 5, clock, label=None),
    Column("accuracy", "eval/accuracy", 5, _decimals),
    Column("greedy", "eval/greedy_accuracy", 5, _decimals),
    Column("failed", "reward/failed_ratio", 3, percent, only_above_0=True),
)
"""`accuracy` and `greedy` are only in the line of a step in which an evaluation finished."""


class TimeLeft:
    """Estimates how long the rest of a run will take, from its latest steps."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._recent_s: deque[float] = deque(maxlen=NUM_RECENT_STEPS)
        self._step = 0

    def log(self, metrics: Mapping[str, float]) -> None:
        """A step is over."""
        self._step = int(metrics["step"])
        if step_s := metrics.get("time/step_s"):
            self._recent_s.append(step_s)

    def __str__(self) -> str:
        """Empty if it isn't known, or if nothing is left."""
        num_left = self._total_steps - self._step
        return clock(num_left * fmean(self._recent_s)) if self._recent_s and num_left > 0 else ""


class ProgressLines:
    """Writes lines to a file or a pipe, each complete when the call returns."""

    def __init__(self, stream: TextIO, total_steps: int, now: Callable[[], datetime] = datetime.now) -> None:
        self._stream, self._total_steps, self._now = stream, total_steps, now
        self._left = TimeLeft(total_steps)
        self._status = ""

    def log(self, metrics: Mapping[str, float]) -> None:
        """The line of one step."""
        self._left.log(metrics)
        fields = [f"step {metrics['step']:>{len(str(self._total_steps))}.0f}/{self._total_steps}"]
        for column in COLUMNS:
            if column.label is not None and (cell := column.cell(metrics)):
                fields.append(f"{column.label or column.title} {cell:>{column.width}}")
        if left := str(self._left):
            fields.append(f"left {left}")
        self.note("  ".join(fields))
        self._status = ""

    def status(self, text: str) -> None:
        """What the run does or waits for now. The same text is written once a step."""
        if text != self._status:
            self._status = text
            self.note(text)

    def progress(self, text: str) -> None:
        """Progress within a step. Lines don't show it, since it changes all the time."""

    def note(self, text: str) -> None:
        """Something that happened."""
        self._stream.write(f"{self._now():%H:%M:%S}  {text}\n")
        self._stream.flush()

    def close(self) -> None:
        """The stream belongs to the caller and stays open."""
