"""What outlives every process: the ledger with its payload segments, and the learner's checkpoints.

In: the product's own journal, opened by one life of the replay server after the other. Out: the same rows and records
to the next life. The ledger is real SQL by the real `Journal`; only its file is memory, since opening one takes longer
than a whole simulated run. `FileDisk` has real files, too, for a share of the runs.
Does not own: who writes when, and who dies of it (`process`).
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from asyncdapo.messages import Group
from asyncdapo.payload import Payload
from asyncdapo.replay import journal as journal_module
from asyncdapo.replay.journal import Journal
from asyncdapo.replay.ledger import open_ledger
from asyncdapo.replay.payloads import Place
from asyncdapo.replay.schema import TABLES, UNDONE_TABLES

SHM = Path("/dev/shm")


@dataclass
class Checkpoint:
    """What the learner goes on from: the lineage of its weights and what they were trained on."""

    step: int
    lineage: list[int]
    trained: dict[int, list[tuple[int, int]]]


class _Connection(sqlite3.Connection):
    """Closed as by a death: what wasn't committed is gone, the rest stays."""

    def close(self) -> None:
        if self.in_transaction:
            self.rollback()


class _NoLock:
    """In one process there is nobody to lock out; `FileDisk` takes the real one."""

    def __init__(self, *_: object) -> None: ...

    def release(self) -> None: ...


class _MemorySegments:
    """As `Segments`, without files: what one life wrote the next can read."""

    def __init__(self, records: dict[int, list[tuple[Group, Payload]]], segment_bytes: int) -> None:
        self._records, self._segment_bytes = records, segment_bytes
        self._begin(max(records, default=0) + 1)

    def _begin(self, number: int) -> None:
        self.newest, self._num_bytes = number, 0
        self._records[number] = []

    def append(self, group: Group, payload: Payload) -> Place:
        if self._num_bytes >= self._segment_bytes:
            self._begin(self.newest + 1)
        self._records[self.newest].append((group, payload))
        self._num_bytes += payload.num_bytes
        return Place(self.newest, len(self._records[self.newest]) - 1, 1)

    def holds(self, place: Place) -> bool:
        return place.offset < len(self._records.get(place.segment, ()))

    def numbers(self) -> list[int]:
        return sorted(self._records)

    def read(self, place: Place) -> tuple[Group, Payload]:
        return self._records[place.segment][place.offset]

    def read_header(self, place: Place) -> Group:
        return self.read(place)[0]

    def delete(self, segment: int) -> None:
        self._records.pop(segment, None)

    def close(self) -> None: ...


@cache
def _connection() -> _Connection:
    """The one ledger in memory, which every run begins by emptying: so its statements are prepared only once."""
    connection = sqlite3.connect(":memory:", isolation_level=None, factory=_Connection, cached_statements=512)
    connection.executescript(TABLES + UNDONE_TABLES)
    return connection


def _emptied() -> _Connection:
    connection = _connection()
    for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        connection.execute(f"DELETE FROM {table}")
    connection.execute("INSERT INTO branches VALUES (0, 0, 0, 0, 'the run began', 0)")
    return connection


class MemoryDisk:
    """A disk of one run."""

    def __init__(self, segment_bytes: int) -> None:
        self.checkpoints: dict[int, Checkpoint] = {}
        self._segment_bytes = segment_bytes
        self._folder = Path(tempfile.gettempdir())
        self._records: dict[int, list[tuple[Group, Payload]]] = {}

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """While this disk is the one that journals open."""
        before = {name: getattr(journal_module, name) for name in ("open_for_writing", "WriterLock", "Segments")}
        self._db = _emptied()
        journal_module.open_for_writing = lambda path: self._db
        journal_module.WriterLock = _NoLock
        journal_module.Segments = lambda folder, segment_bytes: _MemorySegments(self._records, segment_bytes)
        try:
            yield
        finally:
            self._db.close()
            for name, part in before.items():
                setattr(journal_module, name, part)

    def open_journal(self, kind: type[Journal]) -> Journal:
        return kind(self._folder, segment_bytes=self._segment_bytes)

    def query(self, query: str, parameters: Sequence | dict = ()) -> list[tuple]:
        return self._db.execute(query, parameters).fetchall()

    def cut_power(self) -> None:
        """The last record that was written is gone."""
        records = self._records.get(max(self._records, default=0))
        if records:
            records.pop()


class FileDisk(MemoryDisk):
    """Real files: SQLite's write-ahead log, segments, the writer's lock."""

    @contextmanager
    def mounted(self) -> Iterator[None]:
        self._folder = Path(tempfile.mkdtemp(prefix="simulation-", dir=SHM if SHM.is_dir() else None))
        try:
            yield
        finally:
            shutil.rmtree(self._folder)

    def query(self, query: str, parameters: Sequence | dict = ()) -> list[tuple]:
        with closing(open_ledger(self._folder)) as ledger:
            return [tuple(row) for row in ledger.execute(query, parameters)]

    def cut_power(self) -> None:
        folder = self._folder / journal_module.PAYLOAD_FOLDER
        last = max((path for path in folder.glob("*.bin") if path.stat().st_size), default=None)
        if last:
            with last.open("r+b") as file:
                file.truncate(last.stat().st_size - 1)
