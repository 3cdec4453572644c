"""Reporter: everything a run shows, behind one object that the controller owns.

                     ┌▶ metrics.jsonl          one line a step, the record
    log(metrics) ────┼▶ sinks                  W&B and others: the same names, each in a thread of its own
                     ├▶ run.log                one line a step
    status(text) ────┤
    note(text)   ────┤
    progress(text)   └▶ standard output        live on a terminal, lines elsewhere, without progress

Log records of the stages' loggers, and warnings of all others, become notes. A rollback removes lines from
metrics.jsonl. Sinks mark the steps; elsewhere it is a note, and what was shown before stays. Invariant: a step is in
metrics.jsonl before it is shown anywhere else, and no call waits for a sink. Does not own: what is measured, and when.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.jsonl import MetricsFile
from asyncdapo.metrics.progress import ProgressLines
from asyncdapo.metrics.samples import Sample
from asyncdapo.metrics.sinks.opening import check_sinks, open_sinks
from asyncdapo.metrics.sinks.sink import close_all
from asyncdapo.metrics.terminal import LiveTable, terminal_of
from asyncdapo.metrics.verdict.advice import Keys

LOG_FILE = "run.log"
STAGES = (
    "prompts",
    "rollout",
    "environment",
    "reward",
    "filter",
    "replay",
    "learner",
    "weights",
    "transport",
    "eval",
    "controller",
    "metrics",
)
"""Our loggers, each named after its stage."""


class Reporter:
    """Opens the files of RUN_DIR, which exists; with `go_on` those of a run that is resumed. `settings` are what sinks
    show beside the curves, `keys` those that a verdict may advise to change.

    Raises ConfigError for a sink that can't be opened here."""

    def __init__(
        self,
        run_dir: Path,
        config: MetricsConfig,
        name: str,
        total_steps: int,
        *,
        go_on: bool = False,
        keys: Keys,
        settings: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        check_sinks(config)
        self._run_log = (run_dir / LOG_FILE).open("a", encoding="utf-8")
        self._views = [
            ProgressLines(self._run_log, total_steps),
            _open_view(stream or sys.stdout, name, total_steps, keys),
        ]
        self._file = MetricsFile(run_dir, go_on=go_on)
        self._handler = listen(self)
        self._sinks = open_sinks(run_dir, config, name, settings or {})
        if self._file.num_torn:
            self.note(f"metrics: lines of metrics.jsonl that can't be read and are left out: {self._file.num_torn}")

    def log(self, metrics: Mapping[str, float]) -> None:
        """The metrics of one step, `step` among them."""
        self._file.log(metrics)
        self._show(metrics)

    def show_samples(self, samples: Sequence[Sample]) -> None:
        """Completions of one step to look at."""
        for sink in self._sinks if samples else ():
            sink.show_samples(samples)

    def amend(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to the step that was logged last."""
        self._show(self._file.amend(metrics))

    def roll_back(self, step: int, undone_by: int, missing: Iterable[Mapping[str, float]] = ()) -> None:
        """Undo the lines after `step`, in the name of the branch that undoes them. The next line logged is of a later
        step. `missing`: lines of earlier steps; each is added if its step has no line yet."""
        undone, put_in = self._file.roll_back(step, undone_by, missing)
        for sink in self._sinks if undone else ():
            sink.mark_undone(undone, undone_by)
        for line in put_in:
            self._show(line)

    def _show(self, line: Mapping[str, float]) -> None:
        for shown in (*self._sinks, *self._views):
            shown.log(line)

    def status(self, text: str) -> None:
        """What the run does or waits for now, until the next step is logged."""
        for view in self._views:
            view.status(text)

    def progress(self, text: str) -> None:
        """Progress of the next step."""
        for view in self._views:
            view.progress(text)

    def note(self, text: str) -> None:
        """Something that happened."""
        for view in self._views:
            view.note(text)

    def close(self) -> None:
        """Finish all files, and leave the last state on the terminal."""
        try:
            self._file.close()
            close_all(self._sinks)
        finally:
            logging.getLogger().removeHandler(self._handler)
            for view in self._views:
                view.close()
            self._run_log.close()


class View(Protocol):
    """Shows people the progress of a run."""

    def status(self, text: str) -> None:
        """What the run does or waits for now."""

    def note(self, text: str) -> None:
        """Something that happened."""


def listen(view: View) -> NoteHandler:
    """Let log records become notes, until the handler is removed from the root logger."""
    handler = NoteHandler(view)
    logging.getLogger().addHandler(handler)
    for stage in STAGES:
        logging.getLogger(stage).setLevel(logging.INFO)
    return handler


class NoteHandler(logging.Handler):
    """Turns log records into notes: ours from INFO up, those of libraries from WARNING up."""

    def __init__(self, view: View) -> None:
        super().__init__(logging.INFO)
        self._view = view

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name in STAGES

    def emit(self, record: logging.LogRecord) -> None:
        level = f" {record.levelname.lower()}" if record.levelno >= logging.WARNING else ""
        self._view.note(f"{record.name}{level}: {self.format(record)}")


def _open_view(stream: TextIO, name: str, total_steps: int, keys: Keys) -> ProgressLines | LiveTable:
    console = terminal_of(stream)
    return LiveTable(console, name, total_steps, keys) if console else ProgressLines(stream, total_steps)
