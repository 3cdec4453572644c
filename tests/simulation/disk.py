"""What outlives every process: the ledger with its payload segments, and the learner's checkpoints.

In: the product's own journal, opened by one life of the replay server after the other. Out: the same rows and records
to the next life. The ledger is real SQL by the real `Journal`; only its file is memory, since opening one takes longer
than a whole simulated run. `FileDisk` has real files, too, for a share of the runs.
Does not own: who writes when, and who dies of it (`process`).
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from asyncdapo.learner.batches import feed as feed_module
from asyncdapo.messages import Group
from asyncdapo.records.record import BadRecord, Place
from asyncdapo.replay.ledger import journal as journal_module
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.ledger import open_ledger
from asyncdapo.replay.ledger.schema import TABLES, UNDONE_TABLES
from asyncdapo.transport.payload import Payload

SHM = Path("/dev/shm")
Records = dict[int, dict[int, tuple[Group, Payload]]]
"""Of each segment by offset."""


def _read(records: Records, place: Place) -> tuple[Group, Payload]:
    record = records.get(place.segment, {}).get(place.offset)
    if record is None:
        raise BadRecord(f"segment {place.segment}: record {place.offset} is damaged")
    return record


def _read_all(records: Records, places: Mapping[int, Place]) -> dict[int, tuple[Group, Payload]]:
    return {group_id: _read(records, place) for group_id, place in places.items()}


@dataclass
class Checkpoint:
    """What the learner resumes from: the lineage of its weights and what they were trained on."""

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

    def close(self) -> None: ...


class _MemorySegments:
    """As `Segments`, without files: what one life wrote the next can read."""

    def __init__(self, records: Records, segment_bytes: int) -> None:
        self._records, self._segment_bytes = records, segment_bytes
        self._begin(max(records, default=0) + 1)

    def begin_next(self) -> None:
        self._begin(self.newest + 1)

    def _begin(self, number: int) -> None:
        self.newest, self._num_bytes = number, 0
        self._records[number] = {}

    def append(self, group: Group, payload: Payload) -> Place:
        if self._num_bytes >= self._segment_bytes:
            self.begin_next()
        offset = self._num_bytes
        self._records[self.newest][offset] = group, payload
        self._num_bytes += payload.num_bytes
        return Place(self.newest, offset, payload.num_bytes)

    def sync(self) -> None: ...

    def problem_with(self, group_id: int, place: Place) -> str:
        try:
            _read(self._records, place)
        except BadRecord as bad:
            return str(bad)
        return ""

    def numbers(self) -> list[int]:
        return sorted(self._records)

    def read_header(self, group_id: int, place: Place) -> Group:
        return _read(self._records, place)[0]

    def let_go(self, segment: int) -> None: ...

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
        self.run_dir = Path(tempfile.gettempdir())
        self._records: Records = {}

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """While this disk is the one that journals open."""
        self._db = _emptied()
        parts = [
            (journal_module, "open_for_writing", lambda path: self._db),
            (journal_module, "lock_for_writing", _NoLock),
            (journal_module, "sync_log", lambda path: None),
            (journal_module, "fold_log", lambda path: None),
            (journal_module, "Segments", lambda folder, num_bytes: _MemorySegments(self._records, num_bytes)),
            (feed_module, "read_records", lambda folder, places: _read_all(self._records, places)),
        ]
        before = [(module, name, getattr(module, name)) for module, name, _ in parts]
        for module, name, part in parts:
            setattr(module, name, part)
        try:
            yield
        finally:
            self._db.close()
            for module, name, part in before:
                setattr(module, name, part)

    def open_journal(self, kind: type[Journal]) -> Journal:
        return kind(self.run_dir, segment_bytes=self._segment_bytes)

    def query(self, query: str, parameters: Sequence | dict = ()) -> list[tuple]:
        return self._db.execute(query, parameters).fetchall()

    def damage(self, rng: random.Random) -> bool:
        """Something befalls one record, whichever; nothing where there is none."""
        places = [(segment, offset) for segment, records in sorted(self._records.items()) for offset in records]
        if places:
            segment, offset = rng.choice(places)
            self._harm(segment, offset, rng)
        return bool(places)

    def _harm(self, segment: int, offset: int, rng: random.Random) -> None:
        del self._records[segment][offset]


class FileDisk(MemoryDisk):
    """Real files: SQLite's write-ahead log, segments, the writer's lock."""

    @contextmanager
    def mounted(self) -> Iterator[None]:
        self.run_dir = Path(tempfile.mkdtemp(prefix="simulation-", dir=SHM if SHM.is_dir() else None))
        try:
            yield
        finally:
            shutil.rmtree(self.run_dir)

    def query(self, query: str, parameters: Sequence | dict = ()) -> list[tuple]:
        with closing(open_ledger(self.run_dir)) as ledger:
            return [tuple(row) for row in ledger.execute(query, parameters)]

    def damage(self, rng: random.Random) -> bool:
        """A byte of a segment is another one, or its end is gone, or all of it."""
        folder = self.run_dir / journal_module.PAYLOAD_FOLDER
        segments = sorted(path for path in folder.glob("*.bin") if path.stat().st_size)
        if segments:
            self._harm(rng.choice(segments), rng)
        return bool(segments)

    @staticmethod
    def _harm(path: Path, rng: random.Random) -> None:
        content = bytearray(path.read_bytes())
        place = rng.randrange(len(content))
        match rng.randrange(4):
            case 0:
                path.unlink()
            case 1:
                os.truncate(path, place)
            case _:
                content[place] ^= rng.randrange(1, 256)
                path.write_bytes(content)
