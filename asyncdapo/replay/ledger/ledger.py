"""The ledger as a file: how it is created, locked and read.

In: a run directory. Out: a connection, the branch of every batch, a group with its tokens. Readers need no lock and no
running process. They see what is committed, also while the run continues.
Does not own: writing (`journal`), the tables (`schema`), whether they are sound (`audit`).
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import IO

from asyncdapo.disk import LockedError, lock_file
from asyncdapo.errors import RunError, UserError
from asyncdapo.messages import Group
from asyncdapo.records.record import PAYLOAD_FOLDER, Place, read_record
from asyncdapo.replay.ledger.schema import LEDGER_SCHEMA, PARTIALS_TABLE, TABLES, UNDONE_TABLES
from asyncdapo.transport.payload import Payload

LEDGER_FILE = "ledger.db"
LOCK_FILE = "ledger.lock"
LOCK_WAIT_S = 30.0
"""Time for a former writer to finish dying."""
CHECKPOINT_PAGES = 8192
"""Of the WAL (32 MiB). Then SQLite folds it into the ledger, and whoever commits waits for the disk."""
NUM_NAMED = 3
KINDS = {"INTEGER": "integer", "INT": "integer", "REAL": "real", "TEXT": "text"}
"""SQLite's name for the type of a value, by the declared type of its column."""


def lock_for_writing(run_dir: Path, wait_s: float) -> IO[str]:
    """The writer's lock: two replay servers of one run never write at the same time. Held until the file is closed.
    Raises RunError when another process still holds it after `wait_s`."""
    try:
        return lock_file(run_dir / LOCK_FILE, wait_s)
    except LockedError as holder:
        raise RunError(
            f"{run_dir / LOCK_FILE}: process {holder} writes this run's ledger, and did so for {wait_s:g} s "
            "(`asyncdapo ps` shows a run that is still running; end it, or choose another run.dir)"
        ) from None


def open_for_writing(path: Path) -> sqlite3.Connection:
    """The ledger at `path`, created if there is none. The caller holds the writer's lock. A commit doesn't wait for the
    disk: `sync_log` does. Raises UserError for a ledger of another schema."""
    ledger = sqlite3.connect(path, isolation_level=None)
    ledger.execute("PRAGMA journal_mode = WAL")
    ledger.execute("PRAGMA synchronous = FULL")
    if not _has_tables(ledger):
        _start(ledger)
    _check_schema(ledger, path)
    ledger.execute(PARTIALS_TABLE)
    ledger.execute("PRAGMA synchronous = NORMAL")
    ledger.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    return ledger


def sync_log(path: Path) -> None:
    """On return every transaction that was committed to the ledger before is on disk. Any thread may call it."""
    with path.with_name(f"{path.name}-wal").open("rb") as log:
        os.fdatasync(log.fileno())


def fold_log(path: Path) -> None:
    """Fold most of the WAL into the ledger, so that its writer has little left to fold. Any thread may call it; nobody
    waits for it."""
    with closing(sqlite3.connect(path)) as beside:
        beside.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


def open_ledger(run_dir: Path) -> sqlite3.Connection:
    """The ledger for reading, also while the run continues. Raises sqlite3.OperationalError if there is none."""
    ledger = sqlite3.connect(f"{(run_dir / LEDGER_FILE).absolute().as_uri()}?mode=ro", uri=True)
    ledger.row_factory = sqlite3.Row
    return ledger


def is_begun(run_dir: Path) -> bool:
    """Whether there is a ledger. A process that was killed while it created one leaves an empty file, or none."""
    if not (run_dir / LEDGER_FILE).is_file():
        return False
    with closing(open_ledger(run_dir)) as ledger:
        return _has_tables(ledger)


def last_trained(run_dir: Path) -> dict[int, int]:
    """Branch of every batch in the ledger, by step; empty without a ledger. The choice of a checkpoint needs it. Raises
    sqlite3.Error for a damaged ledger."""
    if not is_begun(run_dir):
        return {}
    with closing(open_ledger(run_dir)) as ledger:
        _check_schema(ledger, run_dir / LEDGER_FILE)
        check_values(ledger)
        return {step: branch for step, branch in ledger.execute("SELECT step, branch FROM batches ORDER BY step")}


def describe_unreadable(run_dir: Path, branch: int) -> str:
    """For people: the groups, complete or half sampled, that couldn't be read when `branch` began, so that its rollback
    undid them; empty if there were none."""
    with closing(open_ledger(run_dir)) as ledger:
        rows = ledger.execute(
            "SELECT IFNULL('group ' || lease_id, 'a half-sampled one'), detail FROM events"
            " WHERE kind = 'unreadable' AND branch = ? ORDER BY lease_id",
            (branch,),
        ).fetchall()
    if not rows:
        return ""
    named = ", ".join(f"{what} ({detail})" for what, detail in rows[:NUM_NAMED])
    if len(rows) == 1:
        return f"1 group can't be read back, its prompt is sampled again: {named}"
    more = f" and {len(rows) - NUM_NAMED} more" if len(rows) > NUM_NAMED else ""
    return f"{len(rows)} groups can't be read back, their prompts are sampled again: {named}{more}"


def check_values(ledger: sqlite3.Connection) -> None:
    """Read every page, and check the type of every value, because SQLite has no checksums and doesn't enforce types.
    Raises sqlite3.Error that says what is wrong."""
    damage = ledger.execute("PRAGMA quick_check").fetchone()[0]
    if damage != "ok":
        raise sqlite3.DatabaseError(damage.splitlines()[-1])
    for (table,) in ledger.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        for _, column, declared, *_ in ledger.execute(f"PRAGMA table_info({table})").fetchall():
            kind = KINDS.get(declared)
            others = f"SELECT COUNT(*) FROM {table} WHERE typeof({column}) NOT IN ('null', ?)"
            if kind and ledger.execute(others, (kind,)).fetchone()[0]:
                raise sqlite3.DatabaseError(f"{table}.{column} holds a value that isn't {kind}")
            if kind == "text":
                ledger.execute(f"SELECT DISTINCT {column} FROM {table}").fetchall()


def read_group(run_dir: Path, group_id: int) -> tuple[Group, Payload]:
    """A group with its tokens and log-probs, from the files of a run (all of them with `replay.keep_payloads`).

    Raises LookupError if there is no such group or its payload was freed, BadRecord if it can't be read.
    """
    with closing(open_ledger(run_dir)) as ledger:
        place = place_of(ledger, group_id)
    return read_record(run_dir / PAYLOAD_FOLDER, group_id, place)


def place_of(ledger: sqlite3.Connection, group_id: int) -> Place:
    """Where the payload of a group is. Raises LookupError if it isn't kept, or not any more."""
    row = ledger.execute("SELECT segment, offset, bytes FROM groups WHERE group_id = ?", (group_id,)).fetchone()
    if row is None:
        raise LookupError(f"no group {group_id} in the ledger")
    if row[0] is None:
        raise LookupError(f"the payload of group {group_id} isn't kept (replay.keep_payloads keeps all)")
    return Place(*row)


def _has_tables(ledger: sqlite3.Connection) -> bool:
    return bool(ledger.execute("SELECT EXISTS (SELECT 1 FROM sqlite_master)").fetchone()[0])


def _start(ledger: sqlite3.Connection) -> None:
    """Create the tables in one transaction. A process killed in the middle leaves an empty file, in which the next one
    creates them."""
    now = time.time()
    with ledger:
        ledger.execute("BEGIN")
        for statement in (TABLES + UNDONE_TABLES).split(";"):
            ledger.execute(statement)
        meta = {"schema": LEDGER_SCHEMA, "created_at_s": now, "keep_payloads": 0}
        ledger.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        ledger.execute("INSERT INTO branches VALUES (0, 0, 0, 0, 'the run began', ?)", (now,))


def _check_schema(ledger: sqlite3.Connection, path: Path) -> None:
    row = ledger.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
    if row is None or row[0] != LEDGER_SCHEMA:
        raise UserError(f"{path}: has schema {row and row[0]}, this program has {LEDGER_SCHEMA} (use another run.dir)")
