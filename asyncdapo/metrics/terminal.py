"""Live view of a run on a terminal: the last steps as a table. Below it: the progress of the next step, how long the
rest will take, and what the run waits for.

In: metrics, the current status, notes. Out: a region of the terminal that is redrawn four times a second. Notes and
other output scroll by above it. Does not own: the lines in run.log (`progress`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from asyncdapo.metrics.progress import COLUMNS, NUM_RECENT_STEPS, TimeLeft

REFRESHES_PER_S = 4
FIRST_TO_GO = ("wall", "limit", "learner tok/s", "staleness", "rollout tok/s", "greedy", "failed")
"""Columns that a narrow terminal leaves out, in this order. They are always in metrics.jsonl."""


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
        self, console: Console, name: str, total_steps: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._title, self._now = console, f"{name}, {total_steps} steps", now
        self._recent: tuple[dict[str, str], ...] = ()
        """Cells by their headings."""
        self._left = TimeLeft(total_steps)
        self._progress = ""
        self._status, self._status_since_s = "", now()
        self._live = Live(get_renderable=self._picture, console=console, refresh_per_second=REFRESHES_PER_S)
        self._live.start()

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add the row of one step."""
        self._left.log(metrics)
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
        table = Table(box=None, padding=(0, 1, 0, 0))
        headings = self._headings(self._console.width)
        for heading in headings:
            table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in self._recent:
            table.add_row(*(row[heading] or "-" for heading in headings))
        waited_s = self._now() - self._status_since_s
        left = f", about {self._left} left" if str(self._left) else ""
        parts = [Text(self._title, "bold"), *([table] if self._recent else [])]
        if self._progress:
            parts.append(Text(self._progress + left))
        if self._status:
            parts.append(Text.assemble(self._status, (f"  {waited_s:.0f} s", "dim")))
        return Group(*parts)

    def _headings(self, width: int) -> list[str]:
        """The columns with content, as many as the terminal has room for: none is ever cut."""
        rows = self._recent
        shown = ["step", *(column.title for column in COLUMNS if any(row[column.title] for row in rows))]
        taken = {title: 1 + max(map(len, (*title.split(), *(row[title] for row in rows)))) for title in shown}
        for title in FIRST_TO_GO:
            if title in shown and sum(taken[each] for each in shown) > width:
                shown.remove(title)
        return shown
