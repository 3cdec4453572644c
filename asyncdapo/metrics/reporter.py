"""Reporter: everything a run shows, behind one object that the controller owns.

                     ┌▶ metrics.jsonl          one line a step, the record
    log(metrics) ────┼▶ W&B                    the same names
                     ├▶ run.log                one line a step
    status(text) ────┤
    note(text)   ────┴▶ standard output        live on a terminal, lines elsewhere

Log records of the stages' loggers, and warnings of any other, become notes. Invariant: a step is in metrics.jsonl
before anything else shows it. Does not own: what is measured, and when.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.jsonl import MetricsFile
from asyncdapo.metrics.progress import ProgressLines
from asyncdapo.metrics.terminal import LiveTable
from asyncdapo.metrics.wandb_log import WandbLog, choose_mode

LOG_FILE = "run.log"
STAGES = ("prompts", "rollout", "reward", "filter", "replay", "learner", "weights", "eval", "controller", "metrics")
"""Loggers of ours, each named as its stage."""


class Reporter:
    """Opens the files of RUN_DIR, which exists. `settings` is shown by W&B beside the curves.

    Raises ConfigError for `metrics.wandb: online` without a login."""

    def __init__(
        self,
        run_dir: Path,
        config: MetricsConfig,
        name: str,
        total_steps: int,
        *,
        settings: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        mode = choose_mode(config)
        self._run_log = (run_dir / LOG_FILE).open("a", encoding="utf-8")
        self._views = [ProgressLines(self._run_log, total_steps), _open_view(stream or sys.stdout, name, total_steps)]
        self._records: list[MetricsFile | WandbLog] = [MetricsFile(run_dir)]
        if mode != "disabled":
            self._records.append(WandbLog(run_dir, config, mode, name, settings or {}))
        self._handler = NoteHandler(self)
        logging.getLogger().addHandler(self._handler)
        for stage in STAGES:
            logging.getLogger(stage).setLevel(logging.INFO)

    def log(self, metrics: Mapping[str, float]) -> None:
        """The metrics of one step, `step` among them."""
        for sink in (*self._records, *self._views):
            sink.log(metrics)

    def status(self, text: str) -> None:
        """What the run does or waits for now, until the next step is logged."""
        for view in self._views:
            view.status(text)

    def note(self, text: str) -> None:
        """Something that happened."""
        for view in self._views:
            view.note(text)

    def close(self) -> None:
        """Finish all files and leave the last picture on the terminal. Raises RunError when W&B has failed."""
        try:
            for record in self._records:
                record.close()
        finally:
            logging.getLogger().removeHandler(self._handler)
            for view in self._views:
                view.close()
            self._run_log.close()


class NoteHandler(logging.Handler):
    """Turns log records into notes: ours from INFO on, those of libraries from WARNING on."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.INFO)
        self._reporter = reporter

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name in STAGES

    def emit(self, record: logging.LogRecord) -> None:
        level = f" {record.levelname.lower()}" if record.levelno >= logging.WARNING else ""
        self._reporter.note(f"{record.name}{level}: {self.format(record)}")


def _open_view(stream: TextIO, name: str, total_steps: int) -> ProgressLines | LiveTable:
    console = Console(file=stream)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveTable(console, name, total_steps)
    return ProgressLines(stream, total_steps)
