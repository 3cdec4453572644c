"""`asyncdapo watch RUN…`: what runs do now, in the terminal.

In: run directories. Out: the screen, drawn anew every `REFRESH_S` until Ctrl-C; once if no run is live, or standard
output isn't a terminal. Does not own: what is shown (`terminal`), what is known (`run_state`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live

from asyncdapo.controller.watch.run_state import FINISHED, OVER, RunState
from asyncdapo.controller.watch.terminal import picture
from asyncdapo.metrics.terminal import terminal_of

REFRESH_S = 1.0
PIPE_HEIGHT = 36
"""Lines where nothing limits them."""


def watch(run_dirs: Sequence[Path]) -> int:
    """Show runs until Ctrl-C, which is no error. Raises UserError if one isn't a run."""
    runs = [RunState(run_dir) for run_dir in run_dirs]
    _update(runs)
    console = terminal_of(sys.stdout)
    if console is None or all(run.state in (FINISHED, OVER) for run in runs):
        console = console or Console()
        height = console.height - 1 if console.is_terminal else PIPE_HEIGHT
        console.print(picture(runs, console.width, height))
        return 0
    with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(picture(runs, console.width, console.height), refresh=True)
            time.sleep(REFRESH_S)
            _update(runs)
    return 0


def _update(runs: Sequence[RunState]) -> None:
    for run in runs:
        run.update()
