"""Live view of a run on a terminal: the last steps as a table, and below it what the run waits for, and how long.

In: metrics, the current status, notes. Out: a region of the terminal that is drawn anew four times a second; notes and
whatever else is printed scroll by above it. Does not own: the lines in run.log (`progress`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from asyncdapo.metrics.progress import COLUMNS, cells

NUM_RECENT_STEPS = 12
REFRESHES_PER_S = 4


class LiveTable:
    """Drawn from the start until `close`, which leaves the last picture standing."""

    def __init__(
        self, console: Console, name: str, total_steps: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._total_steps, self._now = name, total_steps, now
        self._recent: tuple[list[str], ...] = ()
        self._status, self._status_since_s = "", now()
        self._live = Live(get_renderable=self._picture, console=console, refresh_per_second=REFRESHES_PER_S)
        self._live.start()

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add the row of one step."""
        row = [f"{metrics['step']:.0f}", *cells(metrics)]
        self._recent = (*self._recent, row)[-NUM_RECENT_STEPS:]
        self._status = ""

    def status(self, text: str) -> None:
        """What the run does or waits for now; it stands until the next step."""
        if text != self._status:
            self._status, self._status_since_s = text, self._now()

    def note(self, text: str) -> None:
        """Something that happened: a line above the table."""
        self._live.console.print(Text(text))

    def close(self) -> None:
        self._live.stop()

    def _picture(self) -> RenderableType:
        title = f"{self._name}, {self._total_steps} steps"
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
        table.add_column("step", justify="right", no_wrap=True)
        for column in COLUMNS:  # on a narrow terminal headings are cut, numbers never
            heading = column.title.replace(" ", "\n")
            table.add_column(heading, justify="right", no_wrap=True, min_width=column.width)
        for row in self._recent:
            table.add_row(*row)
        waited_s = self._now() - self._status_since_s
        return Group(table, Text.assemble(self._status, (f"  {waited_s:.0f} s" if self._status else "", "dim")))
