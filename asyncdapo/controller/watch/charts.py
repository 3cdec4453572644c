"""The charts of the page of `asyncdapo watch --web`, and their numbers.

In: lines of metrics.jsonl. Out: of each chart its title, axis, look and a column for each series, with a number for
each line, or for the mean of neighbours if there are more than `MOST_POINTS`; a number that isn't known is NaN. Pure.
Does not own: how a chart is drawn (page.js), what metrics mean (docs/metrics.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from asyncdapo.accounting.names import LEARNER_STATES, STALENESS_BUCKETS, WORKER_STATES
from asyncdapo.metrics.sparkline import mean, parts
from asyncdapo.metrics.verdict.verdict import LIMITS
from asyncdapo.metrics.verdict.window import LOOP, SHOWN_FATES, Line

MOST_POINTS = 400
"""Of a series. A chart is about as many pixels wide."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Several metrics over train steps, or over training time."""

    title: str
    axis: str
    """Of the numbers, with their unit."""
    series: Mapping[str, str]
    """Labels by metric."""
    look: Literal["lines", "stack"] = "lines"
    counts: bool = False
    """The metrics count from the beginning of the run: what a step added is shown."""
    shares: bool = False
    """What a step has is shown as shares that sum to 1."""


def _states(prefix: str, states: Iterable[str]) -> dict[str, str]:
    return {f"{prefix}{state}_s": state.replace("_", " ") for state in states}


CHARTS = (
    Chart(
        title="Learning curve",
        axis="reward, or ratio",
        series={
            "reward/mean": "reward",
            "reward/filtered_mean": "reward, trained on",
            "eval/accuracy": "accuracy",
            "eval/greedy_accuracy": "greedy accuracy",
        },
    ),
    Chart(
        title="Tokens per second",
        axis="tokens per s",
        series={"rollout/tokens_per_s": "rollout, arrived", "learner/tokens_per_s": "learner, trained on"},
    ),
    Chart(
        title="Time that is lost, by what limits",
        axis="share of the time",
        look="stack",
        series={f"verdict/{limit}_ratio": limit.replace("_", " ") for limit in LIMITS},
    ),
    Chart(
        title="What a step's time goes into",
        axis="s",
        look="stack",
        series=_states("controller/", LOOP),
    ),
    Chart(
        title="Time of the workers",
        axis="share of the time",
        look="stack",
        counts=True,
        shares=True,
        series=_states("rollout/time/", WORKER_STATES),
    ),
    Chart(
        title="Time of the learner",
        axis="s",
        look="stack",
        series=_states("learner/time/", (*LEARNER_STATES, "other")),
    ),
    Chart(
        title="What became of tokens",
        axis="share of the tokens",
        look="stack",
        counts=True,
        shares=True,
        series={f"replay/tokens_{fate}": fate for fate in SHOWN_FATES},
    ),
    Chart(
        title="Staleness of trained tokens",
        axis="share of the tokens",
        look="stack",
        shares=True,
        series={
            f"learner/staleness_{bucket}/tokens": f"{bucket.replace('_', ' to ').replace('to up', 'and more')} steps"
            for bucket in STALENESS_BUCKETS
        },
    ),
    Chart(
        title="Staleness",
        axis="train steps",
        series={"replay/staleness_mean": "mean", "replay/staleness_max": "highest"},
    ),
    Chart(
        title="Length of answers",
        axis="tokens",
        series={
            f"rollout/response_tokens_{which}": label
            for which, label in {"p10": "10 %", "p50": "half", "p90": "90 %", "max": "longest"}.items()
        },
    ),
    Chart(
        title="Queue and credits",
        axis="groups",
        series={
            "replay/queued": "queued",
            "replay/running": "running",
            "replay/in_training": "in training",
            "replay/credits": "credits",
        },
    ),
    Chart(
        title="Filter",
        axis="share of the groups",
        series={
            "filter/kept_ratio": "kept",
            "filter/all_correct_ratio": "all correct",
            "filter/all_wrong_ratio": "all wrong",
        },
    ),
    Chart(
        title="Entropy",
        axis="nats per token",
        series={"learner/entropy": "entropy"},
    ),
    Chart(
        title="Distance from the policy that sampled",
        axis="ratio",
        series={
            "learner/ess": "effective sample size",
            "learner/clip_low_ratio": "clipped below",
            "learner/clip_high_ratio": "clipped above",
        },
    ),
)


def ends(numbers: Sequence[float]) -> list[float]:
    """Of a number that rises from line to line, such as the step: the highest of each point."""
    return [part[-1] for part in parts(numbers, MOST_POINTS)]


def columns(chart: Chart, lines: Sequence[Line]) -> list[list[float]]:
    """A column for each series of the chart; a number for each point."""
    numbers = [[line.get(metric, math.nan) for line in lines] for metric in chart.series]
    if chart.counts:
        numbers = [_rises(column) for column in numbers]
    whole = _shares(numbers) if chart.shares else numbers
    return [[mean(part) for part in parts(column, MOST_POINTS)] for column in whole]


def _rises(column: Sequence[float]) -> list[float]:
    """From line to line. A count that fell was counted again, so what it rose by isn't known."""
    rises = [after - before for before, after in zip(column, column[1:], strict=False)]
    return [math.nan, *(rise if rise >= 0 else math.nan for rise in rises)][: len(column)]


def _shares(numbers: Sequence[Sequence[float]]) -> list[list[float]]:
    """Of the sum in each line; a part that isn't known is left out of it."""
    sums = [sum(number for number in line if math.isfinite(number)) for line in zip(*numbers, strict=True)]
    return [
        [number / whole if whole > 0 else math.nan for number, whole in zip(column, sums, strict=True)]
        for column in numbers
    ]
