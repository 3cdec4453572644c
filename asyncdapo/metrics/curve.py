"""RUN_DIR/curve.png: the results of a run on one page, drawn from metrics.jsonl.

In: RUN_DIR/metrics.jsonl. Out: accuracy over train wall time and over steps, reward, staleness. A panel without numbers
says so. It only reads files, so it also draws runs that ended early. matplotlib is imported when a curve is drawn, and
needs no screen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from asyncdapo.metrics.jsonl import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE_NAME = "curve.png"

BLUE, ORANGE, GREEN, GREY, PALE = "#2f6db3", "#d9742b", "#3c8c4d", "#8a8f98", "#d5dae1"


@dataclass(frozen=True)
class Series:
    """One line of a panel."""

    metric: str
    label: str
    color: str
    look: Literal["line", "joined points", "points", "area"] = "line"


@dataclass(frozen=True)
class Panel:
    """One set of axes: several metrics over one."""

    title: str
    over: str
    over_label: str
    series: tuple[Series, ...]
    bottom: float | None = None
    top: float | None = None
    whole_ticks: bool = False


ACCURACY = (
    Series("eval/accuracy", "sampled", BLUE, "joined points"),
    Series("eval/greedy_accuracy", "greedy", ORANGE, "points"),
)

PANELS = (
    Panel("Held-out accuracy", "time/wall_s", "training wall time (s)", ACCURACY, 0, 1),
    Panel("Held-out accuracy", "step", "train step", ACCURACY, 0, 1),
    Panel(
        "Mean reward",
        "step",
        "train step",
        (Series("reward/mean", "all groups", BLUE), Series("reward/filtered_mean", "groups trained on", ORANGE)),
    ),
    Panel(
        "Staleness (train steps)",
        "step",
        "train step",
        (
            Series("replay/staleness_max", "highest of the batch", PALE, "area"),
            Series("replay/staleness_mean", "mean of the batch", GREEN),
        ),
        bottom=0,
        whole_ticks=True,
    ),
)


def draw_curve(run_dir: Path) -> Path:
    """Draw RUN_DIR/curve.png from RUN_DIR/metrics.jsonl. Returns its path."""
    path = run_dir / FILE_NAME
    make_figure(run_dir.name, read_metrics(run_dir)).savefig(path, dpi=150, format="png")
    return path


def make_figure(name: str, lines: Sequence[Mapping[str, float]]) -> Figure:
    """The four panels for the lines of metrics.jsonl."""
    from matplotlib.figure import Figure

    last = lines[-1] if lines else {}
    headline = f"{name}: {last.get('step', 0)} train steps in {last.get('time/wall_s', 0):,.0f} s"
    figure = Figure(figsize=(10, 7.4))
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.07, top=0.86, wspace=0.14, hspace=0.46)
    figure.suptitle(headline, fontsize=13, x=0.015, ha="left")
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw(axes, panel, lines)
    return figure


def _draw(axes: Axes, panel: Panel, lines: Sequence[Mapping[str, float]]) -> None:
    for series in panel.series:
        if points := _points(lines, panel.over, series.metric):
            _draw_series(axes, series, points)
    axes.set_title(panel.title, loc="left", fontsize=11, pad=24)
    axes.set_xlabel(panel.over_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)
    axes.set_ylim(panel.bottom, panel.top)
    axes.locator_params(axis="y", integer=panel.whole_ticks)
    if axes.has_data():
        # between title and axes, where no curve can run through it
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 0.985))
    else:
        axes.text(0.5, 0.5, "not measured in this run", transform=axes.transAxes, ha="center", color=GREY)


def _draw_series(axes: Axes, series: Series, points: list[tuple[float, float]]) -> None:
    over, values = zip(*points, strict=True)
    if series.look == "area":
        axes.fill_between(over, values, step="mid", color=series.color, linewidth=0, label=series.label)
        return
    axes.plot(
        over,
        values,
        label=series.label if series.look == "line" else f"{series.label} {values[0]:.2f} → {values[-1]:.2f}",
        color=series.color,
        linestyle="none" if series.look == "points" else "-",
        linewidth=1.8,
        marker={"line": "", "joined points": "o", "points": "D"}[series.look],
        markersize=5,
        clip_on=series.look == "line",
        zorder=3,
    )


def _points(lines: Sequence[Mapping[str, float]], over: str, metric: str) -> list[tuple[float, float]]:
    """The lines in which both numbers are finite."""
    pairs = [(line.get(over, math.nan), line.get(metric, math.nan)) for line in lines]
    return [pair for pair in pairs if all(math.isfinite(number) for number in pair)]
