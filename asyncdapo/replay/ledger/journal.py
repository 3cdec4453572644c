"""The journal: every event of the core that changed something, in `RUN_DIR/ledger.db`.

In: a core event, the actions that it caused, and what the core doesn't know of it (the group that arrived, the prompts
granted). Out: rows that any `sqlite3` can read (docs/ledger.md), the places of a batch's groups, and the whole state
for a process that resumes the run (`recover`), with or without a rollback.

    bytes, then row     a group's buffers are in their segment before the row that points to them exists
    disk, then send     `durable` waits for the disk beside the event loop: first for the segments, then for the WAL. A
                        group is acknowledged, and a batch is sent, only after that. So neither a kill nor a power cut
                        loses anything that a peer was told. A row that nobody was told of may have lost its payload
                        after a power cut; a rollback undoes it
    together            events written `together` are one transaction, and all that is written while the disk is busy
                        is synced together
    one writer          the run directory is locked as long as the journal is open

Does not own: which state follows which (the core), the rows of an entry (`entry`), what a rollback undoes (`rollback`),
sockets.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from asyncdapo import faults
from asyncdapo.disk import disk_errors
from asyncdapo.errors import RunError
from asyncdapo.messages import Group, Prompt
from asyncdapo.records.record import PAYLOAD_FOLDER, Place
from asyncdapo.replay.config import ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.recovery import GroupFacts, Recovered
from asyncdapo.replay.ledger import reload
from asyncdapo.replay.ledger.entry import Entry
from asyncdapo.replay.ledger.ledger import (
    LEDGER_FILE,
    LOCK_WAIT_S,
    fold_log,
    lock_for_writing,
    open_for_writing,
    place_of,
    sync_log,
)
from asyncdapo.replay.ledger.payloads import SEGMENT_BYTES, Segments
from asyncdapo.replay.ledger.rollback import Rollback
from asyncdapo.replay.ledger.schema import HELD_STATES
from asyncdapo.transport.codec import Buffer
from asyncdapo.transport.payload import Payload

RECORDED_EVENTS = (
    core.WorkerJoined,
    core.WorkerLost,
    core.WorkerDrained,
    core.WeightsLoaded,
    core.SamplingBegan,
    core.Published,
    core.RunEnded,
)
"""Events that are recorded even if they cause no action."""


class Journal:
    """The one writer of a run's ledger. It lives in the replay server's event loop; what other threads may call says
    so."""

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_payloads: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        """Open the run's ledger, or create it. Raises UserError if the ledger has another schema or is damaged,
        RunError if another process still holds its lock after `lock_wait_s`."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / LEDGER_FILE
        self._keep_payloads = keep_payloads
        self._lock = lock_for_writing(run_dir, lock_wait_s)
        self._db = open_for_writing(self._path)
        self._db.execute("UPDATE meta SET value = ? WHERE key = 'keep_payloads'", (int(keep_payloads),))
        self._segments = Segments(run_dir / PAYLOAD_FOLDER, segment_bytes)
        self._syncing = threading.Lock()
        self._num_commits = self._num_synced = 0
        self._sessions = reload.sessions(self._db)
        self._position = reload.last_position(self._db)
        self.branch: int = self._db.execute("SELECT MAX(branch) FROM branches").fetchone()[0]
        """Branch that new rows belong to."""

    def roll_back(self, step: int, reason: str, config: ReplayConfig, *, replaces: bool) -> None:
        """Undo, in one transaction, what came of weights newer than version `step`, and begin a branch. `replaces`: see
        `FilterConfig`. Raises RunError if the ledger holds no batch `step`: then it is of another history than the
        checkpoint."""
        row = (0,)
        if step > 0:
            row = self._db.execute("SELECT trained_pos FROM batches WHERE step = ?", (step,)).fetchone()
        if row is None:
            raise RunError(f"{self._path}: holds no batch {step} to go back to (use a checkpoint of an earlier step)")
        self._position += 1
        rollback = Rollback(
            db=self._db,
            config=config,
            replaces=replaces,
            problem_with=cache(self._segments.problem_with),
            step=step,
            pos=row[0],
            branch=self.branch + 1,
            opened_pos=self._position,
            at_s=time.time(),
        )
        with self.together(), disk_errors(self._path):
            rollback.run(reason)
            faults.point("in_roll_back")
            if rollback.unreadable:
                self._segments.begin_next()  # what damaged an older record may have deleted the open file, too
        self.sync()
        self.branch += 1

    def recover(self) -> Recovered:
        """The ledger's record, from which the core and the server resume."""
        return reload.recover(self._db)

    def batch_facts(self, step: int) -> list[GroupFacts]:
        """Members of a trained batch; empty if there is no such batch."""
        return reload.batch_facts(self._db, step)

    def num_copies(self, step: int) -> int:
        """Copies in a batch that was cut."""
        return sum(reload.batch_copies(self._db, step).values())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Everything written in the body is one transaction, which outlives this process at the end. If the body
        raises, or the disk fails (DiskError), nothing is written. Inside another such body it is part of that
        transaction."""
        if self._db.in_transaction:
            yield
            return
        num_changes = self._db.total_changes
        with self._db:
            self._db.execute("BEGIN")
            yield
            if self._db.total_changes == num_changes:
                return
            faults.point("before_commit")
            with disk_errors(self._path):
                self._db.execute("COMMIT")
        self._num_commits += 1
        faults.point("after_commit")

    async def durable(self) -> None:
        """Wait, beside the event loop, until all that is committed is on disk. Raises DiskError."""
        if self._num_synced < self._num_commits:
            await asyncio.to_thread(self.sync)

    def sync(self) -> None:
        """On return all that was committed before the call is on disk, so a power cut loses none of it. Any thread may
        call it. Raises DiskError."""
        with self._syncing:
            num_commits = self._num_commits
            if self._num_synced < num_commits:
                with disk_errors(self._path):
                    self._segments.sync()
                    sync_log(self._path)
                self._num_synced = num_commits

    def write(
        self,
        event: core.Event,
        actions: Sequence[core.Action],
        *,
        prompts: Sequence[Prompt] = (),
        arrived: tuple[Group, Payload] | None = None,
        saved: Sequence[Buffer] = (),
        detail: str = "",
        summary: Mapping[str, float] | None = None,
    ) -> None:
        """Write the event, then its actions in order, in a transaction of their own or `together` with others. An event
        that caused no action may leave no row. Raises DiskError; then nothing is written.

        prompts  the prompts of the leases granted in `actions`
        arrived  header and buffers of a `GroupDone`
        saved    header and buffers of a `PartialGroup`
        detail   see `Entry`
        summary  what the learner reports of a `Trained` step
        """
        if not actions and not isinstance(event, RECORDED_EVENTS):
            return
        self._position += 1
        entry = Entry(
            db=self._db,
            segments=self._segments,
            sessions=self._sessions,
            keep_payloads=self._keep_payloads,
            branch=self.branch,
            position=self._position,
            at_s=time.time(),
            arrived=arrived,
            saved=saved,
            detail=detail,
        )
        with self.together(), disk_errors(self._path):
            faults.disk_write(arrived[1].num_bytes if arrived else 0)
            entry.write(event, actions, prompts, summary or {})

    def places(self, group_ids: Sequence[int]) -> list[Place]:
        """Where the payloads of these groups are. Raises LookupError if one isn't kept."""
        return [place_of(self._db, group_id) for group_id in group_ids]

    def read_header(self, group_id: int, place: Place) -> Group:
        """A group without its payload. Any thread may call it. Raises BadRecord if it can't be read."""
        return self._segments.read_header(group_id, place)

    def read_partial(self, prompt_id: int, lease_id: int) -> Sequence[bytes]:
        """Header and buffers of what former leases than this one have sampled of the prompt; empty if that is
        nothing. Raises BadRecord if they aren't as they were saved."""
        return reload.saved_frames(self._db, prompt_id, before=lease_id)

    def answer_lengths(self) -> dict[tuple[str, int], float]:
        """See `reload.answer_lengths`."""
        return reload.answer_lengths(self._db)

    def solved_shares(self) -> Iterator[tuple[int, float]]:
        """See `reload.solved_shares`."""
        return reload.solved_shares(self._db)

    def outcome(self, lease_id: int) -> str | None:
        """How a lease ended, or `undone`; None while it runs. Raises LookupError if it was never granted."""
        return reload.outcome(self._db, lease_id)

    def settled(self, step: int) -> list[int]:
        """The full segments with groups of batch `step` in which no group may still be cut or trained: only a rollback
        would read them."""
        rows = self._db.execute(
            "SELECT DISTINCT segment FROM groups AS member WHERE step = ? AND segment < ? AND NOT EXISTS"
            " (SELECT 1 FROM groups WHERE segment = member.segment AND state IN (?, ?, ?))",
            (step, self._segments.newest, *HELD_STATES),
        )
        return [segment for (segment,) in rows]

    def let_go(self, segments: Iterable[int]) -> None:
        """Keep these segments on disk alone. It takes a while: any thread may call it, once they are synced. Raises
        DiskError."""
        with disk_errors(self._path):
            for segment in segments:
                self._segments.let_go(segment)

    def covered(self, step: int) -> set[int]:
        """`step` is the oldest checkpoint kept. Strike the segments that no rollback to it or to a newer one can need
        from the ledger, and return them: `free` deletes them.

        Nothing needs a group any more that ended before step `step` was trained, that the filter dropped, or that a
        rollback undid. Any other group may be needed again: a rollback may train its batch again or queue it again.
        """
        if self._keep_payloads:
            return set()
        (position,) = self._db.execute("SELECT MAX(trained_pos) FROM batches WHERE step <= ?", (step,)).fetchone()
        needed = self._db.execute(
            "SELECT DISTINCT segment FROM groups WHERE segment IS NOT NULL"
            " AND (state IN (?, ?, ?) OR (changed_pos > ? AND state <> 'filtered'))",
            (*HELD_STATES, position or 0),
        ).fetchall()
        done = set(self._segments.numbers()) - {segment for (segment,) in needed} - {self._segments.newest}
        with self.together(), disk_errors(self._path):
            for table in ("groups", "undone_groups"):
                self._db.executemany(
                    f"UPDATE {table} SET segment = NULL, offset = NULL, bytes = NULL WHERE segment = ?",
                    [(segment,) for segment in done],
                )
        return done

    def free(self, segments: Iterable[int]) -> None:
        """Delete segments that are struck from the ledger, and fold most of its WAL into ledger.db. It takes a while:
        any thread may call it. Raises DiskError."""
        self.sync()
        faults.point("in_covered")
        for segment in segments:
            self._segments.delete(segment)
        with disk_errors(self._path):
            fold_log(self._path)

    def fold(self) -> None:
        """Fold the WAL into ledger.db, so that this file alone is the whole ledger. It takes a while: call it when
        nobody waits."""
        with disk_errors(self._path):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def close(self) -> None:
        """Close the files; SQLite folds its WAL into ledger.db."""
        with self._syncing:  # a thread may still wait for the disk
            self._db.close()
            self._segments.close()
            self._lock.close()
