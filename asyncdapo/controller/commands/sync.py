"""`asyncdapo sync RUN_DIR`: uploads to W&B what waits in a run directory, for want of a login or a network.

In: a run that isn't running, a login. Out: its offline launches at W&B with curves, tables and marks, under its id; the
project's board. What was uploaded before is left out, so it can be repeated. Returns the exit code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asyncdapo.api import Run
from asyncdapo.controller.process import roster
from asyncdapo.errors import UserError
from asyncdapo.metrics.sinks.wandb_board import save_board
from asyncdapo.metrics.sinks.wandb_login import logged_in
from asyncdapo.metrics.sinks.wandb_upload import upload, waiting_launches


def sync(run_dir: Path) -> int:
    """Upload, and say what was done. Raises UserError without a login, and for a run that is running."""
    project = Run(run_dir).config.metrics.wandb_project
    with at_wandb() as entity:
        if waiting := waiting_launches(run_dir):
            check_over(run_dir)
            upload(waiting)
            if left := waiting_launches(run_dir):
                counts = f"{len(left)} of {len(waiting)}"
                print(f"asyncdapo: {counts} launches couldn't be uploaded, see above", file=sys.stderr)
                return 1
        board = "saved" if save_board(entity, project) else "there already"
    print(f"{run_dir}: {len(waiting)} launches uploaded; the board of {entity}/{project} is {board}")
    return 0


@contextmanager
def at_wandb() -> Iterator[str]:
    """Who is logged in at W&B. Raises UserError without a login, since W&B would prompt for one, and for what W&B's
    server or the network refuses in the context."""
    if not logged_in():
        raise UserError("W&B: no login (run `wandb login`, or set WANDB_API_KEY)")
    import wandb

    try:
        yield str(wandb.Api().default_entity)
    except wandb.Error as error:
        raise UserError(f"W&B: {' '.join(str(error).split())} (once more, when it answers)") from error


def check_over(run_dir: Path) -> None:
    """Raises UserError while the run is running: W&B would take what is there for all of it."""
    entries = roster.read(run_dir) if (run_dir / roster.FILE_NAME).exists() else []
    if any(entry.role == "controller" and roster.is_running(entry) for entry in entries):
        raise UserError(f"{run_dir}: the run is running (sync it when it has ended)")
