"""Live view of a run on a terminal.

    name, steps, time left
    the last steps as a table
    reward     a sparkline of this launch
    verdict    what limits the run, and what to change
    the progress of the next step
    what the run waits for

In: metrics, the current status, notes. Out: a region of the terminal that is redrawn four times a second, never higher
than the terminal: the table has as many steps as there is room for. Notes and other output scroll by above it. Does not
own: the lines in run.log (`progress`).
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from asyncdapo.metrics.progress import COLUMNS, NUM_RECENT_STEPS, TimeLeft
from asyncdapo.metrics.sparkline import sparkline
from asyncdapo.metrics.verdict.advice import Keys
from asyncdapo.metrics.verdict.running_verdict import NUM_STEPS, latest_words

REFRESHES_PER_S = 4
FIRST_TO_GO = ("wall", "limit", "learner tok/s", "staleness", "rollout tok/s", "greedy", "failed")
"""Columns that a narrow terminal leaves out, in this order. They are always in metrics.jsonl."""
HEADINGS = 3
"""Lines of the picture's name and of the table's headings."""
CURVE = "reward/mean"


def terminal_of(stream: TextIO, environ: Mapping[str, str] = os.environ) -> Console | None:
    """The terminal behind a stream if it can redraw. Pipes and files can't, even if colours are forced. A cell of
    Jupyter can't either: it gives `!commands` a terminal that keeps everything drawn."""
    if not stream.isatty() or "JPY_PARENT_PID" in environ:
        return None
    console = Console(file=stream)
    return None if console.is_dumb_terminal else console


class LiveTable:
    """Drawn from the start until `close`, which leaves the last state on the screen."""

    def __init__(
        self, console: Console, name: str, total_steps: int, keys: Keys, now: Callable[[], float] = time.monotonic
    ) -> None:
        """`keys`: those that a verdict may advise to change."""
        self._console, self._title, self._now = console, f"{name}, {total_steps} steps", now
        self._recent: tuple[dict[str, str], ...] = ()
        """Cells by their headings."""
        self._left, self._keys = TimeLeft(total_steps), keys
        self._rewards: list[float] = []
        self._lines: deque[Mapping[str, float]] = deque(maxlen=NUM_STEPS + 1)
        self._verdict = self._progress = ""
        self._status, self._status_since_s = "", now()
        self._live = Live(get_renderable=self._picture, console=console, refresh_per_second=REFRESHES_PER_S)
        self._live.start()

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add the row of one step."""
        self._left.log(metrics)
        self._lines.append(metrics)
        self._verdict = latest_words(list(self._lines), self._keys)
        if math.isfinite(reward := metrics.get(CURVE, math.nan)):
            self._rewards.append(reward)
        row = {"step": f"{metrics['step']:.0f}"} | {column.title: column.cell(metrics) for column in COLUMNS}
        self._recent = (*self._recent, row)[-NUM_RECENT_STEPS:]
        self._status = ""

    def status(self, text: str) -> None:
        """What the run does or waits for now. Shown until the next step."""
        if text != self._status:
            self._status, self._status_since_s = text, self._now()

    def progress(self, text: str) -> None:
        """Progress of the next step. Shown until it is called again."""
        self._progress = text

    def note(self, text: str) -> None:
        """Something that happened: a line above the table."""
        self._console.print(Text(text))

    def close(self) -> None:
        self._progress = ""
        self._live.stop()

    def _picture(self) -> RenderableType:
        left = f", about {self._left} left" if str(self._left) else ""
        below = self._below()
        room = self._console.height - 1 - HEADINGS - sum(len(self._console.render_lines(part)) for part in below)
        steps = self._recent[-max(1, room) :]
        return Group(Text(self._title + left, "bold"), *([self._table(steps)] if steps else []), *below)

    def _table(self, steps: Sequence[Mapping[str, str]]) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0))
        headings = self._headings(self._console.width)
        for heading in headings:
            table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in steps:
            table.add_row(*(row[heading] or "-" for heading in headings))
        return table

    def _below(self) -> list[Text]:
        """What stands below the table."""
        parts = []
        if len(self._rewards) > 1:
            first, last = self._rewards[0], self._rewards[-1]
            line = sparkline(self._rewards, min(60, self._console.width - 30))
            parts.append(Text.assemble(("reward   ", "dim"), (line, "cyan"), f"  {first:.3f} → {last:.3f}"))
        if self._verdict:
            parts.append(Text.assemble(("verdict  ", "dim"), self._verdict))
        if self._progress:
            parts.append(Text(self._progress))
        if self._status:
            waited_s = self._now() - self._status_since_s
            parts.append(Text.assemble(self._status, (f"  {waited_s:.0f} s", "dim")))
        return parts

    def _headings(self, width: int) -> list[str]:
        """The columns with content, as many as the terminal has room for: none is ever cut."""
        rows = self._recent
        shown = ["step", *(column.title for column in COLUMNS if any(row[column.title] for row in rows))]
        taken = {title: 1 + max(map(len, (*title.split(), *(row[title] for row in rows)))) for title in shown}
        for title in FIRST_TO_GO:
            if title in shown and sum(taken[each] for each in shown) > width:
                shown.remove(title)
        return shown
