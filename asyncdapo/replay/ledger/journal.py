"""The journal: every event of the core that changed something, in `RUN_DIR/ledger.db`.

In: a core event, the actions that it caused, and what the core doesn't know of it (the group that arrived, the prompts
granted). Out: rows that any `sqlite3` can read (docs/ledger.md), the groups again when a batch is cut, and the whole
state again when another process goes on (`recover`), after a rollback or without one.

    bytes, then row     a group's buffers are in their segment before the row that points to them exists
    disk, then commit   the segment is synced before the transaction is committed, and SQLite (WAL, synchronous FULL)
                        syncs the commit before it returns: a power cut leaves rows with their payloads
    commit, then send   whoever acknowledges a group or sends a batch after that can be killed at once, or its machine
                        lose power, and nothing that a peer was told is forgotten
    one transaction     what comes together (`together`) is synced together: two waits for the disk, however many groups
    one writer          the run directory is locked for as long as the journal is open

Does not own: which state follows which (the core), what a rollback undoes (`rollback`), sockets.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from asyncdapo import faults
from asyncdapo.disk import disk_errors
from asyncdapo.errors import RunError
from asyncdapo.messages import Group, Prompt
from asyncdapo.payload import Payload
from asyncdapo.replay.config import ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.recovery import GroupFacts, Recovered
from asyncdapo.replay.ledger import reload
from asyncdapo.replay.ledger.ledger import LEDGER_FILE, PAYLOAD_FOLDER, open_for_writing, place_of
from asyncdapo.replay.ledger.lock import LOCK_WAIT_S, WriterLock
from asyncdapo.replay.ledger.payloads import SEGMENT_BYTES, Segments
from asyncdapo.replay.ledger.rollback import Rollback
from asyncdapo.replay.ledger.rows import group_row
from asyncdapo.replay.ledger.schema import HELD_STATES

RECORDED_EVENTS = (
    core.WorkerJoined,
    core.WorkerLost,
    core.WeightsLoaded,
    core.SamplingBegan,
    core.Published,
    core.RunEnded,
)
"""Events that leave a row even when they cause no action."""


class Journal:
    """The one writer of a run's ledger. Not thread-safe: it lives in the replay server's event loop."""

    branch: int
    """Branch that new rows belong to."""

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_payloads: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        """Opens the run's ledger, or starts it. Raises UserError when it is one of another layout or damaged, RunError
        when another process keeps writing it for `lock_wait_s`."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / LEDGER_FILE
        self._keep_payloads = keep_payloads
        self._lock = WriterLock(run_dir, lock_wait_s)
        self._db = open_for_writing(self._path)
        self._db.execute("UPDATE meta SET value = ? WHERE key = 'keep_payloads'", (int(keep_payloads),))
        self._segments = Segments(run_dir / PAYLOAD_FOLDER, segment_bytes)
        self._sessions = reload.sessions(self._db)
        self._position = reload.last_position(self._db)
        (self.branch,) = self._db.execute("SELECT MAX(branch) FROM branches").fetchone()

    def roll_back(self, step: int, reason: str, config: ReplayConfig, *, replaces: bool) -> None:
        """Undo what came of weights newer than those of train step `step`, in one transaction, and begin a branch.
        `replaces`: see `FilterConfig`.

        Raises RunError when the ledger holds no batch `step`: it is not of the history that the checkpoint is of.
        """
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
                self._segments.begin_next()  # what harmed an older record may have taken the file away under its writer
        self.branch += 1

    def recover(self) -> Recovered:
        """What the ledger says now: where the core and the server go on."""
        return reload.recover(self._db)

    def batch_facts(self, step: int) -> list[GroupFacts]:
        """Members of a batch that is trained; empty when there is none."""
        return reload.batch_facts(self._db, step)

    def num_copies(self, step: int) -> int:
        """Copies of members that stand in a batch that was cut."""
        return sum(reload.batch_copies(self._db, step).values())

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is written in the body is one transaction, and on disk when the body ends; nothing of it is written when
        the body raises, or the disk does (DiskError). Within another one, it is part of that."""
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
                self._segments.sync()
                self._db.execute("COMMIT")
        faults.point("after_commit")

    def write(
        self,
        event: core.Event,
        actions: Sequence[core.Action],
        *,
        prompts: Sequence[Prompt] = (),
        arrived: tuple[Group, Payload] | None = None,
        detail: str = "",
        summary: Mapping[str, float] | None = None,
    ) -> None:
        """The event, then its actions in order, in a transaction of their own or `together` with others; nothing when
        there is nothing to write down. Raises DiskError; then nothing of it is written.

        prompts  the prompts of the leases granted in `actions`
        arrived  header and buffers of a `GroupDone`
        detail   session of a `WorkerJoined`; why a group was rejected or its reward function failed
        summary  what the learner reports of a `Trained` step
        """
        if not actions and not isinstance(event, RECORDED_EVENTS):
            return
        self._position += 1
        self._now = time.time()
        with self.together(), disk_errors(self._path):
            faults.disk_write(arrived[1].num_bytes if arrived else 0)
            self._write_event(event, detail)
            self._insert_new_prompts(prompts)
            for action in actions:
                self._write_action(action, arrived, detail)
            if isinstance(event, core.Trained):
                self._insert_batch(event.step, summary or {})

    def read(self, group_id: int) -> tuple[Group, Payload]:
        """A group whose payload was kept. Raises LookupError when it isn't kept, BadRecord when it can't be read."""
        return self._segments.read(place_of(self._db, group_id))

    def read_header(self, group_id: int) -> Group:
        """The same without its payload's bytes."""
        return self._segments.read_header(place_of(self._db, group_id))

    def outcome(self, lease_id: int) -> str | None:
        """How a lease ended, or `undone`; None while it runs. Raises LookupError when it was never granted."""
        return reload.outcome(self._db, lease_id)

    def covered(self, step: int) -> None:
        """`step` is the oldest checkpoint kept: free the segments that no rollback to it or a newer one can ask for.

        A group is done with when it had its end before step `step` was trained. One that ended later may come back:
        its batch is trained again, or it returns to the queue. (Not one that the filter dropped or a rollback undid.)
        """
        if self._keep_payloads:
            return
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
        faults.point("in_covered")
        for segment in done:
            self._segments.delete(segment)

    def fold(self) -> None:
        """Fold the WAL into ledger.db, so that this file alone is the whole ledger. Takes a while: at rest points."""
        with disk_errors(self._path):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def close(self) -> None:
        """Close the files; SQLite folds its WAL into ledger.db."""
        self._db.close()
        self._segments.close()
        self._lock.release()

    # ------------------------------------------------------------------------------------------------------ events

    def _write_event(self, event: core.Event, detail: str) -> None:
        match event:
            case core.WorkerJoined(worker=worker, loaded_version=version):
                self._sessions[worker] = detail
                self._insert_event("worker_joined", worker=worker, detail=detail)
                self._insert_load(worker, version)
            case core.WorkerLost(worker=worker):
                self._insert_event("worker_lost", worker=worker)
            case core.WeightsLoaded(worker=worker, version=version):
                self._insert_load(worker, version)
            case core.SamplingBegan(lease_id=lease_id, version=version):
                self._db.execute("UPDATE leases SET started_version = ? WHERE lease_id = ?", (version, lease_id))
            case core.Published(version=version):
                self._db.execute("INSERT INTO publishes VALUES (?, ?, ?, ?)", (version, self.branch, *self._stamp))
            case core.RunEnded():
                self._insert_event("run_ended")

    def _write_action(self, action: core.Action, arrived: tuple[Group, Payload] | None, detail: str) -> None:
        match action:
            case core.GrantLease():
                self._insert_lease(action)
            case core.MovePrompt():
                self._move_prompt(action)
            case core.MoveGroup():
                self._move_group(action, arrived)
            case core.EndLease():
                self._end_lease(action, detail)
            case core.CutBatch(step=step, copies=copies):
                self._insert_event("cut", step=step, number=sum(copies))
            case core.GenBatchClosed(step=step, number=number, limit_reached=reached):
                self._insert_event(
                    "gen_batch_closed", step=step, number=number, detail="limit reached" if reached else ""
                )
            case core.StopRun(reason=reason, error=error):
                self._insert_event("stopped", number=int(error), detail=reason)

    @property
    def _stamp(self) -> tuple[int, float]:
        return self._position, self._now

    def _insert_event(
        self,
        kind: str,
        *,
        lease_id: int | None = None,
        prompt_id: int | None = None,
        worker: int | None = None,
        step: int | None = None,
        number: int | None = None,
        detail: str = "",
    ) -> None:
        self._db.execute(
            "INSERT INTO events (kind, branch, lease_id, prompt_id, worker, step, number, detail, pos, at_s)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (kind, self.branch, lease_id, prompt_id, worker, step, number, detail, *self._stamp),
        )

    def _insert_load(self, worker: int, version: int) -> None:
        self._db.execute("INSERT INTO loads VALUES (?, ?, ?, ?, ?)", (worker, version, self.branch, *self._stamp))

    # ------------------------------------------------------------------------------------ prompts, leases and groups

    def _insert_new_prompts(self, prompts: Sequence[Prompt]) -> None:
        """A prompt has its row from its first lease on."""
        self._db.executemany(
            "INSERT OR IGNORE INTO prompts VALUES (?, ?, ?, ?, 'waiting', 0, NULL, '', NULL, ?)",
            [(prompt.prompt_id, prompt.epoch, prompt.source, prompt.row, self._position) for prompt in prompts],
        )

    def _insert_lease(self, action: core.GrantLease) -> None:
        session = self._sessions[action.worker]
        self._db.execute(
            "INSERT INTO leases (lease_id, prompt_id, branch, attempt, worker, session, granted_pos, granted_at_s)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (action.lease_id, action.prompt_id, self.branch, action.attempt, action.worker, session, *self._stamp),
        )

    def _move_prompt(self, action: core.MovePrompt) -> None:
        moved = self._db.execute(
            "UPDATE prompts SET state = ?, attempts = ?, step = ?, reason = ?, place = ?, changed_pos = ?"
            " WHERE prompt_id = ?",
            (action.state, action.attempts, action.step, action.reason, action.place, self._position, action.prompt_id),
        )
        assert moved.rowcount == 1, f"{action} of a prompt that was never leased"

    def _end_lease(self, action: core.EndLease, detail: str) -> None:
        """A late group changes nothing about its lease, which has ended before."""
        if action.outcome != "late":
            self._db.execute(
                "UPDATE leases SET outcome = ?, reason = ?, ended_pos = ?, ended_at_s = ? WHERE lease_id = ?",
                (action.outcome, action.reason, *self._stamp, action.lease_id),
            )
        if action.outcome != "done":
            self._insert_event(
                action.outcome,
                lease_id=action.lease_id,
                prompt_id=action.prompt_id,
                worker=action.worker,
                detail=detail or action.reason,
            )

    def _move_group(self, action: core.MoveGroup, arrived: tuple[Group, Payload] | None) -> None:
        """The row of a group is made by the first move after its arrival."""
        moved = self._db.execute(
            "UPDATE groups SET state = ?, step = ?, reason = ?, changed_pos = ? WHERE group_id = ?",
            (action.state, action.step, action.reason, self._position, action.group_id),
        )
        if moved.rowcount == 0:
            assert arrived is not None, f"{action} of a group that never arrived"
            self._insert_group(action, *arrived)

    def _insert_group(self, action: core.MoveGroup, group: Group, payload: Payload) -> None:
        held = action.state in HELD_STATES or self._keep_payloads
        place = self._segments.append(group, payload) if held else None
        row = group_row(action, group, place, position=self._position, now_s=self._now)
        columns, values = ", ".join(row), ", ".join(f":{column}" for column in row)
        self._db.execute(f"INSERT INTO groups ({columns}) VALUES ({values})", row)

    def _insert_batch(self, step: int, summary: Mapping[str, float]) -> None:
        """The batch as its groups say it was: they became `trained` in this same transaction."""
        copies = {group_id: num for group_id, num in reload.batch_copies(self._db, step).items() if num}
        self._db.execute(
            "INSERT INTO batches SELECT :step, :branch, :version, COUNT(*), :copies, SUM(tokens),"
            " MAX(:version - min_version), AVG(:version - min_version), AVG(reward_mean), :summary, :pos, :at_s"
            " FROM groups WHERE step = :step AND state = 'trained'",
            {
                "step": step,
                "branch": self.branch,
                "version": summary.get("learner/version", step - 1),
                "copies": json.dumps(copies),
                "summary": json.dumps({name: float(number) for name, number in summary.items()}),
                "pos": self._position,
                "at_s": self._now,
            },
        )
