"""What a run does now, from the files of its directory alone.

In: config.yaml, metrics.jsonl, processes.json, workers.json, run.log and ledger.db of a run that is live, over or
resumed. Out: its lines, state, verdict, alarms, workers and newest notes. An update reads what is new, and nothing
whole that grows with the run but metrics.jsonl, once. Writes nothing, asks no process. Does not own: how it is shown
(`terminal`).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from asyncdapo.api import Run
from asyncdapo.controller.commands.ps import Row, processes
from asyncdapo.controller.process import roster
from asyncdapo.errors import UserError
from asyncdapo.metrics.alarms import Alarms
from asyncdapo.metrics.progress import NUM_RECENT_STEPS, TimeLeft
from asyncdapo.metrics.reporter import LOG_FILE
from asyncdapo.metrics.tail import MetricsTail
from asyncdapo.metrics.verdict.advice import keys_in_force
from asyncdapo.metrics.verdict.running_verdict import latest_words, verdict_of
from asyncdapo.replay.ledger.ledger import is_begun, open_ledger
from asyncdapo.replay.workers_file import WorkerRow, read_rows

RUNNING, FINISHED, OVER = "running", "finished", "ended early"
LOG_TAIL_BYTES = 16 << 10
WORK = "SELECT worker, COUNT(*), SUM(tokens) FROM groups WHERE step = ? GROUP BY worker"


@dataclass(frozen=True)
class Work:
    """What a worker sampled of the newest batch."""

    groups: int = 0
    tokens: int = 0


class RunState:
    """Of one run. `update` brings everything up to date."""

    def __init__(self, run_dir: Path) -> None:
        """Raises UserError if there is no run."""
        run = Run(run_dir)
        config = run.config
        self.dir, self.name, self.total_steps = run.dir, run.dir.name, config.run.steps
        self._keys = keys_in_force(config)
        self._tail = MetricsTail(run.dir)
        self._alarms, self._num_checked = Alarms({}, {}), 0
        self.state = OVER
        self.rows: list[Row] = []
        """The processes of the latest launch."""
        self.work: dict[int, Work] = {}
        """By worker."""
        self.heard: dict[int, WorkerRow] = {}
        """What replay heard from each worker last."""
        self.notes: list[str] = []
        """Newest lines of run.log but those of steps, oldest first."""

    def update(self) -> None:
        """Read what is new."""
        self._tail.update()
        if self._num_checked > len(self.lines):  # the run went back
            self._alarms, self._num_checked = Alarms({}, {}), 0
        for line in self.lines[self._num_checked :]:
            self._alarms.check(line)
        self._num_checked = len(self.lines)
        self.state = self._read_state()
        self.rows = processes(self.dir) if (self.dir / roster.FILE_NAME).exists() else []
        self.work = dict(self._read_work())
        self.heard = read_rows(self.dir)
        self.notes = [note for note in last_lines(self.dir / LOG_FILE) if note[10:].partition(" ")[0] != "step"]

    @property
    def lines(self) -> list[dict[str, float]]:
        """Of metrics.jsonl."""
        return self._tail.lines

    @property
    def last(self) -> dict[str, float]:
        """The newest line; empty before the first."""
        return self.lines[-1] if self.lines else {}

    @property
    def step(self) -> int:
        """Train steps done."""
        return int(self.last.get("step", 0))

    @property
    def time_left(self) -> str:
        """Of a run that is running; empty if it isn't known."""
        left = TimeLeft(self.total_steps)
        for line in self.lines[-NUM_RECENT_STEPS:]:
            left.log(line)
        return str(left) if self.state == RUNNING else ""

    @property
    def limit(self) -> str:
        """What limits the run, in a word; empty if it isn't known."""
        verdict = verdict_of(self.last)
        return verdict.limit if verdict else ""

    @property
    def verdict(self) -> str:
        """What limits the run, and what to change; empty if it isn't known."""
        return latest_words(self.lines, self._keys)

    @property
    def alarms(self) -> list[str]:
        """Those that have begun and not ended."""
        return list(self._alarms.active.values())

    def _read_state(self) -> str:
        try:
            entries = roster.read(self.dir)
        except (FileNotFoundError, UserError):
            entries = []
        for entry in entries:
            if entry.role == "controller" and roster.is_running(entry):
                return RUNNING
            if entry.role == "controller" and roster.state_of(entry) == roster.OTHER_HOST:
                return f"on {entry.host}"
        return FINISHED if self.step >= self.total_steps else OVER

    def _read_work(self) -> Iterator[tuple[int, Work]]:
        """Nothing while there is no ledger, or it can't be read now."""
        try:
            if not is_begun(self.dir):
                return
            with closing(open_ledger(self.dir)) as ledger:
                for worker, *work in ledger.execute(WORK, (self.step,)).fetchall():
                    yield worker, Work(*work)
        except sqlite3.OperationalError:
            return


def last_lines(path: Path, num_bytes: int = LOG_TAIL_BYTES) -> list[str]:
    """The last whole lines of a text file, of as many bytes; none of one that is missing."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        begin = max(0, os.fstat(file.fileno()).st_size - num_bytes)
        file.seek(begin)
        lines = file.read().decode(errors="replace").split("\n")
    return lines[1 if begin else 0 : -1]
