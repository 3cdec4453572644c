"""What `asyncdapo watch` shows in a terminal.

    name, state, progress, time left
    pipeline: a column a stage, its depth and its rate         (one run)
    sparklines of the curves to watch                          (one run)
    verdict, alarms, processes, newest notes                   (one run, as far as there is room)

In: the states of runs, the size of the terminal. Out: something that rich draws, never higher or wider than the
terminal. Several runs get a row each, to compare. Texts from files are shown as they are: nothing in them is markup.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asyncdapo.controller.watch.run_state import FINISHED, RUNNING, RunState
from asyncdapo.metrics.progress import clock, percent, thousands
from asyncdapo.metrics.sparkline import sparkline

PROCESSES_FROM = (100, 32)
"""Width and height from which there is room for the table of processes."""
COLORS = {RUNNING: "green", FINISHED: "blue"}

Show = Callable[[float], str]


def _decimals(number: float) -> str:
    return f"{number:.3g}"


@dataclass(frozen=True)
class Cell:
    """A number of a stage."""

    metric: str
    show: Show
    unit: str

    def text(self, run: RunState) -> str:
        number = run.last.get(self.metric, math.nan)
        return f"{self.show(number)}{self.unit}" if math.isfinite(number) else "-"


PIPELINE = {
    "prompts": (Cell("filter/prompts_consumed", thousands, " used"), Cell("replay/credits", thousands, " credits")),
    "rollout": (Cell("replay/running", thousands, " leases"), Cell("rollout/tokens_per_s", thousands, " tok/s")),
    "filter": (Cell("filter/kept_ratio", percent, " kept"), Cell("filter/all_correct_ratio", percent, " solved")),
    "replay": (
        Cell("replay/queued", thousands, " queued"),
        Cell("replay/staleness_mean", _decimals, " stale"),
        Cell("replay/run_ahead", _decimals, " ahead"),
    ),
    "learner": (Cell("replay/in_training", thousands, " groups"), Cell("learner/tokens_per_s", thousands, " tok/s")),
    "weights": (Cell("step", thousands, " versions"), Cell("weights/publish_s", _decimals, " s to send")),
}
"""Depth and rate of each stage, and how far rollout may be ahead."""
CURVES: tuple[tuple[str, str, Show], ...] = (
    ("reward", "reward/mean", _decimals),
    ("accuracy", "eval/accuracy", _decimals),
    ("rollout tok/s", "rollout/tokens_per_s", thousands),
    ("learner tok/s", "learner/tokens_per_s", thousands),
    ("staleness", "replay/staleness_mean", _decimals),
    ("entropy, nats", "learner/entropy", _decimals),
    ("answer, tokens", "rollout/response_tokens_mean", thousands),
    ("step, s", "time/step_s", _decimals),
)


def picture(runs: Sequence[RunState], width: int, height: int) -> RenderableType:
    """The whole screen."""
    if len(runs) > 1:
        return _comparison(runs, width)
    run = runs[0]
    parts: list[RenderableType] = [_title(run), _progress(run, width)]
    if run.lines:
        parts += [Text(), _pipeline(run), Text(), *_curves(run, width)]
    console = Console(width=width, height=height)
    room = height - sum(_height(console, part) for part in parts)
    return Group(*parts, *_fitting(console, _below(run, width, height), room))


def _title(run: RunState) -> Text:
    return Text.assemble((run.name, "bold"), "  ", (run.state, COLORS.get(run.state, "yellow")), no_wrap=True)


def _progress(run: RunState, width: int) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    wall = f"{clock(run.last['time/wall_s'])} trained" if "time/wall_s" in run.last else "no step yet"
    left = f", about {run.time_left} left" if run.time_left else ""
    bar = ProgressBar(run.total_steps, run.step, width=max(10, width - 50))
    row.add_row(bar, f"step {run.step}/{run.total_steps}, {wall}{left}")
    return row


def _pipeline(run: RunState) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for stage in PIPELINE:
        table.add_column(stage if stage == "weights" else f"{stage} →", no_wrap=True)
    for row in zip_longest(*PIPELINE.values()):
        table.add_row(*(cell.text(run) if cell else "" for cell in row))
    return table


def _curves(run: RunState, width: int) -> Iterator[RenderableType]:
    """A line for each curve that has numbers."""
    steps = [line for line in run.lines if line.get("step", 0) > 0 or "eval/accuracy" in line]
    for title, metric, show in CURVES:
        numbers = [line[metric] for line in steps if math.isfinite(line.get(metric, math.nan))]
        if numbers:
            line = sparkline(numbers, min(120, width - 40))
            first_to_last = f"{show(numbers[0])} → {show(numbers[-1])}"
            yield Text.assemble((f"{title:<15}", "dim"), (line, "cyan"), f"  {first_to_last}", no_wrap=True)


def _below(run: RunState, width: int, height: int) -> Iterator[RenderableType]:
    """What is shown if there is room for it, the most important first."""
    if run.verdict:
        yield Text()
        yield Text.assemble(("verdict  ", "bold"), run.verdict)
    for alarm in run.alarms:
        yield Text(alarm, "red")
    if run.rows and width >= PROCESSES_FROM[0] and height >= PROCESSES_FROM[1]:
        yield Text()
        yield _processes(run)
    yield Text()
    for note in reversed(run.notes):
        yield Text(note, "dim")


def _fitting(console: Console, parts: Iterator[RenderableType], room: int) -> Iterator[RenderableType]:
    """Parts from the first on, as long as they fit."""
    for part in parts:
        room -= _height(console, part)
        if room < 0:
            return
        yield part


def _height(console: Console, part: RenderableType) -> int:
    return len(console.render_lines(part))


def _processes(run: RunState) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("process", "pid", "state", "behind", "memory", "of the last batch", "tok/s", "slots", "heartbeat"):
        table.add_column(heading, no_wrap=True, header_style="dim")
    for row in run.rows:
        is_worker = row.role == "rollout"
        work = run.work.get(row.index) if is_worker else None
        heard = run.heard.get(row.index) if is_worker else None
        table.add_row(
            f"{row.role} {row.index}",
            str(row.pid),
            row.state,
            "-" if row.lag is None else f"{row.lag} {row.lag_unit}",
            "-" if row.memory_mib is None else f"{row.memory_mib:,.0f} MiB",
            f"{work.groups} groups, {work.tokens:,} tokens" if work else "",
            thousands(heard.tokens_per_s) if heard and heard.tokens_per_s is not None else "",
            _decimals(heard.running) if heard and heard.running is not None else "",
            f"{clock(max(0.0, time.time() - heard.heard_at_s))} ago" if heard else "",
        )
    return table


def _comparison(runs: Sequence[RunState], width: int) -> RenderableType:
    """A row for each run."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("run", "state", "step", "reward", "", "accuracy", "limit", "left"):
        table.add_column(heading, no_wrap=True, header_style="dim")
    for run in runs:
        rewards, accuracies = (
            [line[metric] for line in run.lines if math.isfinite(line.get(metric, math.nan))]
            for metric in ("reward/mean", "eval/accuracy")
        )
        table.add_row(
            Text(run.name, "bold"),
            Text(run.state, COLORS.get(run.state, "yellow")),
            f"{run.step}/{run.total_steps}",
            Text(sparkline(rewards, max(8, width - 75)), "cyan"),
            _decimals(rewards[-1]) if rewards else "-",
            _decimals(accuracies[-1]) if accuracies else "-",
            run.limit or "-",
            run.time_left or "-",
        )
    return table
