"""Weights & Biases: the same names as metrics.jsonl, on an axis of `step`, with a board of the project.

In: the metrics of each step. Out: a W&B run with its files under RUN_DIR/wandb, and RUN_DIR/wandb.id, with which a
resumed run continues it. Its config holds the unit of each metric under `units`. W&B deletes nothing: for a step that
was undone and trained again it has both points, and `undone_by` marks the step. It never prompts. In place of W&B's own
output there is one line: the run's address, or the command that uploads it.

Failures: a server that can't be reached takes the run offline, which is said; a board that can't be saved is said, and
nothing else is lost. Does not own: the record of the run (metrics.jsonl); what the board shows (`dashboard/sections`).
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.dashboard.units import unit_of
from asyncdapo.metrics.jsonl import UNDONE_BY
from asyncdapo.metrics.samples import COLUMNS, Sample
from asyncdapo.metrics.sinks.wandb_login import Mode

ID_FILE = "wandb.id"
INIT_TIMEOUT_S = 30.0
"""For W&B's server to open the run; then it is offline. The end of a run waits longer (`FINISH_TIMEOUT_S`)."""
BOARD_TIMEOUT_S = 60.0

logger = logging.getLogger("metrics")


class WandbSink:
    """One W&B run. `settings`: the run's configuration, shown beside its curves."""

    def __init__(
        self, run_dir: Path, config: MetricsConfig, mode: Mode, name: str, settings: Mapping[str, Any]
    ) -> None:
        import wandb

        def start(chosen: Mode) -> Any:
            return wandb.init(
                mode=chosen,
                project=config.wandb_project,
                name=name,
                id=run_id(run_dir),
                resume="allow",
                dir=str(run_dir),
                config=dict(settings),
                allow_val_change=True,
                settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S),
            )

        self._wandb = wandb
        self._run = open_run(start, wandb.teardown, mode, wandb.Error)
        self._units: dict[str, str] = {}
        logger.info(describe(None if self._run.offline else self._run.url, run_dir))
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if not self._run.offline:
            self._save_board()

    def log(self, metrics: Mapping[str, float]) -> None:
        units = {name: unit_of(name) for name in metrics.keys() - self._units.keys()}
        if units:
            self._units |= units
            self._run.config.update({"units": dict(sorted(self._units.items()))}, allow_val_change=True)
        self._run.log(dict(metrics))

    def show_samples(self, samples: Sequence[Sample]) -> None:
        table = self._wandb.Table(columns=list(COLUMNS), data=[sample.row() for sample in samples])
        self._run.log({"step": samples[0].step, "samples": table})

    def mark_undone(self, steps: Sequence[int], undone_by: int) -> None:
        for step in steps:
            self.log({"step": step, UNDONE_BY: undone_by})

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # end its process now, not when this one ends

    def _save_board(self) -> None:
        """In a process of its own (`wandb_board` says why)."""
        command = [sys.executable, "-m", "asyncdapo.metrics.sinks.wandb_board", self._run.entity, self._run.project]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=BOARD_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning("W&B: the project's board isn't saved: no answer for %g s", BOARD_TIMEOUT_S)
        except subprocess.CalledProcessError as error:
            logger.warning("W&B: the project's board isn't saved: %s", error.stderr.strip().rpartition("\n")[2])


def describe(url: str | None, run_dir: Path) -> str:
    """Where to see the run: its address, or the command that uploads it if it is offline."""
    return f"W&B: {url}" if url else f"W&B is offline: asyncdapo sync {os.path.relpath(run_dir)} uploads it"


def run_id(run_dir: Path) -> str:
    """The id of this run directory at W&B, made at the first launch."""
    path = run_dir / ID_FILE
    known = path.read_text().strip() if path.exists() else ""
    if not known:
        known = secrets.token_hex(4)
        path.write_text(known + "\n")
    return known


def open_run(start: Callable[[Mode], Any], give_up: Callable[[], None], mode: Mode, error_type: type[Exception]) -> Any:
    """Start a run in `mode`, or offline if the server can't be reached, once `give_up` has ended the attempt."""
    try:
        return start(mode)
    except error_type as error:
        if mode != "online":
            raise
        logger.warning("W&B continues offline: %s", " ".join(str(error).split()))
        give_up()
        return start("offline")
