"""Power cuts at every moment of a small run, on a file system that keeps what was synced and nothing else for certain.

A recorder watches what the journal writes and syncs. Each moment gives every disk that it may leave behind: unsynced
bytes of a segment are gone, there, zeros, or half there; a segment whose name was not synced is gone or there; of the
commits since the last sync all are there, none, or a part of the WAL. Each of these disks is then gone on from. Groups
whose worker was told are there with their payloads. Of others a row may have lost its payload: the rollback undoes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from asyncdapo.replay.config import ReplayConfig
from asyncdapo.replay.ledger.invariants import INVARIANTS
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.ledger import open_ledger, read_group
from tests.replay.small_run import SmallRun

LEDGER_FILES = ("ledger.db", "ledger.db-wal")
CONFIG = ReplayConfig(prompts_per_step=2, run_ahead=1.0, max_staleness=1)
Ledger = tuple[bytes, ...]


@dataclass
class Segment:
    """What a segment holds, and how much of it is certain."""

    content: bytes
    num_synced: int
    named: bool


@dataclass
class Moment:
    """The power may fail now."""

    before: Ledger
    """What is synced."""
    segments: dict[str, Segment]
    acked: frozenset[int]
    """Groups whose worker was told that they are safe."""
    after: Ledger
    """What is committed."""

    def disks(self) -> Iterator[tuple[Ledger, dict[str, bytes]]]:
        ledgers = [self.before]
        if self.after != self.before:
            database, wal = self.after
            ledgers += [self.after, (database, wal[: (len(self.before[1]) + len(wal)) // 2])]
        for ledger, tail, lost in product(ledgers, (0, 1, 2, 3), (True, False)):
            segments = {}
            for name, segment in self.segments.items():
                sure, rest = segment.content[: segment.num_synced], segment.content[segment.num_synced :]
                if segment.named or not lost:
                    segments[name] = sure + (b"", rest, bytes(len(rest)), rest[: len(rest) // 2])[tail]
            yield ledger, segments


class Recorder:
    """Every moment of a run."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._run_dir, self._fsync, self._fdatasync = run_dir, os.fsync, os.fdatasync
        self._synced: dict[str, int] = {}
        self._named: set[str] = set()
        self._durable: Ledger = ()
        self.moments: list[Moment] = []
        self.acked: set[int] = set()
        monkeypatch.setattr(os, "fsync", self._sync_folder)
        monkeypatch.setattr(os, "fdatasync", self._sync)

    def watch(self) -> None:
        self._durable = self._ledger()

    def see(self) -> None:
        paths = sorted((self._run_dir / "payloads").glob("*.bin"))
        segments = {p.name: Segment(p.read_bytes(), self._synced.get(p.name, 0), p.name in self._named) for p in paths}
        self.moments.append(Moment(self._durable, segments, frozenset(self.acked), self._ledger()))

    def _sync(self, descriptor: int) -> None:
        self.see()
        self._fdatasync(descriptor)
        path = _path_of(descriptor)
        self._synced[path.name] = path.stat().st_size
        if path.name == LEDGER_FILES[1]:
            self._durable = self._ledger()

    def _sync_folder(self, descriptor: int) -> None:
        if self._durable:
            self.see()
        self._fsync(descriptor)
        self._named |= {found.name for found in _path_of(descriptor).glob("*.bin")}

    def _ledger(self) -> Ledger:
        return tuple((self._run_dir / name).read_bytes() for name in LEDGER_FILES)


def _path_of(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))


def recorded_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Recorder:
    """Three steps, some groups that are not kept, a rollback, a checkpoint that frees segments."""
    recorder = Recorder(run_dir, monkeypatch)
    run = SmallRun(run_dir, **settings)
    recorder.watch()
    run.join(0)
    for step in (1, 2, 3):
        while run.state.next_batch.num_ready < 2:
            run.ready(0, 4)
            together = run.running(0)[:2]
            with run.dispatch.together():
                for number, lease_id in enumerate(together):
                    run.answer(lease_id, accs=(1.0, float(number == step)), versions=((step - 1, 4),))
                    recorder.see()
            recorder.see()
            run.journal.sync()
            recorder.acked.update(together)
            recorder.see()
        run.train(step)
        recorder.see()
        if step == 2:
            run.journal.free(run.journal.covered(1))
            run.roll_back(2)
    recorder.see()
    monkeypatch.undo()
    run.journal.close()
    return recorder


def check_disk(run_dir: Path, acked: frozenset[int]) -> None:
    with closing(open_ledger(run_dir)) as ledger:
        query = "SELECT group_id FROM groups UNION SELECT group_id FROM undone_groups"
        known = {group_id for (group_id,) in ledger.execute(query)}
        placed = {group_id for (group_id,) in ledger.execute("SELECT group_id FROM groups WHERE segment IS NOT NULL")}
        (trained,) = ledger.execute("SELECT COALESCE(MAX(step), 0) FROM batches").fetchone()
    assert acked <= known, "a group that was acknowledged is forgotten"
    for group_id in acked & placed:
        assert read_group(run_dir, group_id)[0].lease_id == group_id
    journal = Journal(run_dir)
    journal.roll_back(trained, "the power was cut", CONFIG, replaces=False)
    journal.recover()
    journal.close()
    with closing(open_ledger(run_dir)) as ledger:
        unreadable = {
            lease_id for (lease_id,) in ledger.execute("SELECT lease_id FROM events WHERE kind = 'unreadable'")
        }
    assert not acked & unreadable
    check_invariants(run_dir)


def check_invariants(run_dir: Path) -> None:
    limits = {
        "bound": 1,
        "batch_min": 2,
        "batch_max": 2,
        "group_size": 2,
        "max_attempts": 3,
        "replaces": 0,
        "finished": 0,
    }
    with closing(open_ledger(run_dir)) as ledger:
        for invariant, query in INVARIANTS.items():
            found = ledger.execute(query, limits).fetchall()
            assert not found or invariant == "there is a batch", f"{invariant}: {[dict(row) for row in found]}"


@pytest.mark.parametrize("segment_bytes", [1, 1500])
def test_whenever_the_power_is_cut_what_was_promised_is_on_disk_and_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment_bytes: int
) -> None:
    recorder = recorded_run(tmp_path / "run", monkeypatch, segment_bytes=segment_bytes)
    disks = {
        (ledger, tuple(segments.items()), moment.acked)
        for moment in recorder.moments
        for ledger, segments in moment.disks()
    }
    assert len(disks) > len(recorder.moments) > 30
    for number, (ledger, segments, acked) in enumerate(disks):
        run_dir = tmp_path / f"disk{number}"
        (run_dir / "payloads").mkdir(parents=True)
        for name, content in (*zip(LEDGER_FILES, ledger, strict=True), *segments):
            folder = run_dir if name in LEDGER_FILES else run_dir / "payloads"
            (folder / name).write_bytes(content)
        check_disk(run_dir, acked)
