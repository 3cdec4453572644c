"""`asyncdapo ps RUN_DIR`: the processes of a run as a person wants to see them, without asking any of them.

In: `processes.json`, `ledger.db` and the names in `checkpoints/`, of a run that is running or over. Out: a table, or
with `--json` a list of objects with the same fields:

    role index pid host started   as in processes.json
    state       running | stopped | zombie | gone | other host
    age_s       seconds since it started, null unless it lives here
    lag         how far it is behind, in `lag_unit`: a rollout worker in `versions` (newest published − loaded), replay
                in `groups` (kept, waiting for a batch), the learner in `steps` (trained since the newest checkpoint)
    memory_mib  resident memory

Below the table stand the latest workers that came and went, if any has gone.

It writes nothing and asks no process, so it works for a run that hangs. Does not own: the list (`roster`).
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from asyncdapo.controller.process import roster
from asyncdapo.errors import UserError
from asyncdapo.learner.storage.checkpoint import kept_steps
from asyncdapo.replay.ledger.ledger import LEDGER_FILE, open_ledger


@dataclass(frozen=True, kw_only=True)
class Row:
    """One process, as shown."""

    role: str
    index: int
    pid: int
    host: str
    started: float
    state: str
    age_s: float | None
    lag: int | None
    lag_unit: str | None
    memory_mib: float | None


def show(run_dir: Path, as_json: bool) -> int:
    """Print the processes of a run. Raises UserError where there never was one."""
    rows = processes(run_dir)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        Console().print(_table(rows))
        for line in comings_and_goings(run_dir):
            print(line)
    return 0


def processes(run_dir: Path) -> list[Row]:
    """A row for each process of the last launch in `run_dir`."""
    try:
        entries = roster.read(run_dir)
    except FileNotFoundError:
        raise UserError(
            f"{run_dir / roster.FILE_NAME} is missing: no run was started there (give the run.dir of a launch)"
        ) from None
    lag = lags(run_dir)
    return [_row(entry, *lag(entry)) for entry in entries]


def _row(entry: roster.Entry, lag: int | None, lag_unit: str | None) -> Row:
    state = _state(entry)
    lives_here = state in ("running", "stopped")
    return Row(
        role=entry.role,
        index=entry.index,
        pid=entry.pid,
        host=entry.host,
        started=entry.started,
        state=state,
        age_s=round(time.time() - entry.started, 1) if lives_here else None,
        lag=lag,
        lag_unit=lag_unit,
        memory_mib=_memory_mib(entry.pid) if lives_here else None,
    )


def _state(entry: roster.Entry) -> str:
    state = roster.state_of(entry)
    if state in roster.ENDED:
        return state
    return "stopped" if state in roster.STOPPED else "running"


def _memory_mib(pid: int) -> float | None:
    with suppress(psutil.NoSuchProcess):  # it has ended since
        return round(psutil.Process(pid).memory_info().rss / 2**20, 1)
    return None


# ------------------------------------------------------------------------------------------------------------------ lag

Lag = tuple[int | None, str | None]
NO_LAG: Lag = (None, None)


def lags(run_dir: Path) -> Callable[[roster.Entry], Lag]:
    """How far each process is behind. Unknown without a ledger; a ledger that can't be read is reported on stderr, and
    the processes are shown all the same."""
    if not (run_dir / LEDGER_FILE).exists():
        return lambda entry: NO_LAG
    try:
        with closing(open_ledger(run_dir)) as ledger:
            published, queued, trained = (_number(ledger, query) for query in (PUBLISHED, QUEUED, TRAINED))
            loaded = {worker: version for worker, version, _ in ledger.execute(LOADED)}
    except sqlite3.Error as error:
        print(f"asyncdapo: {run_dir / LEDGER_FILE}: {error}: lag is unknown", file=sys.stderr)
        return lambda entry: NO_LAG

    def lag(entry: roster.Entry) -> Lag:
        match entry.role:
            case "rollout" if entry.index in loaded:
                return max(0, published - loaded[entry.index]), "versions"
            case "replay":
                return queued, "groups"
            case "learner":
                return max(0, trained - max(kept_steps(run_dir), default=0)), "steps"
        return NO_LAG

    return lag


PUBLISHED = "SELECT MAX(version) FROM publishes"
QUEUED = "SELECT COUNT(*) FROM groups WHERE state = 'queued'"
TRAINED = "SELECT MAX(step) FROM batches"
LOADED = "SELECT worker, version, MAX(pos) FROM loads GROUP BY worker"
"""What each worker loaded last, by position: a restarted one begins again with the model's own weights."""


LIVES = (
    "SELECT kind, worker, detail, at_s FROM events"
    " WHERE kind IN ('worker_joined', 'worker_drained', 'worker_lost') ORDER BY event_id DESC LIMIT ?"
)
NUM_LIVES = 6
"""Of them that are shown."""


def comings_and_goings(run_dir: Path) -> list[str]:
    """A line for each of the latest workers that joined, left or died, the newest last; none if none has gone, or the
    ledger can't be read."""
    if not (run_dir / LEDGER_FILE).exists():
        return []
    try:
        with closing(open_ledger(run_dir)) as ledger:
            latest = ledger.execute(LIVES, (NUM_LIVES,)).fetchall()[::-1]
    except sqlite3.Error:
        return []
    said = {"worker_drained": "left: {}", "worker_lost": "died: {}"}
    return [
        f"{time.strftime('%m-%d %H:%M:%S', time.localtime(at_s))}  rollout {worker} "
        + said.get(kind, "joined").format(detail)
        for kind, worker, detail, at_s in latest
        if any(kind in said for kind, *_ in latest)
    ]


def _number(ledger: sqlite3.Connection, query: str) -> int:
    return ledger.execute(query).fetchone()[0] or 0


# ---------------------------------------------------------------------------------------------------------------- table


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("role", "index", "pid"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "role" else "right")
    table.add_column("host", overflow="fold")  # the only one that may be long
    for heading in ("started", "state", "lag", "memory"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("lag", "memory") else "left")
    for row in rows:
        table.add_row(
            row.role,
            str(row.index),
            str(row.pid),
            row.host,
            time.strftime("%m-%d %H:%M:%S", time.localtime(row.started)),
            row.state,
            "-" if row.lag is None else f"{row.lag} {row.lag_unit}",
            "-" if row.memory_mib is None else f"{row.memory_mib:.0f} MiB",
        )
    return table
