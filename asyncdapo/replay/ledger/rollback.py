"""A rollback: the ledger goes back to the checkpoint of train step k, and a new branch begins.

In: the tables. Out: the tables without what came of weights newer than version k. The caller opens the transaction.
Every row that is removed or overwritten is first copied to an `undone_*` table. Let p be the journal position at which
batch k was trained:

    groups    A group with a token newer than version k is removed. Every other one keeps its verdict, whenever it
              arrived: to sample only some kinds of groups again would bias the training data.
                kept            batch k + 1 is restored if it was cut, with the same members and copies. Other kept
                                groups return to the queue, or end `expired` if they are too old for the next batch
                constant or     stays `filtered`; a spare one stays spare as long as its batch isn't cut. Under
                masked          `filter.mode: replace` such groups have places in the queue: a spare one stays spare,
                                and one that ended with an undone cut is spare again
                stale           if it was stale on arrival, it is removed if it arrived after p
                surplus         of the barrier stays surplus
    leases    Those without a group are removed if they were open or ended after p. The attempts they cost are given
              back.
    prompts   follow their group. One without a group that had no end at p waits again; those in flight come first.
    partials  What is saved of a prompt stays if the prompt waits, no token is newer than version k, none is too old
              for the next batch, and the row is as it was written. Otherwise it is dropped.
    the rest  batches, cuts and measured paces by step; publishes, loads and events by position

A kept group whose payload can't be read (missing, short, damaged or another's) is removed too: its prompt is sampled
again, and an event `unreadable` says why, as it does of a row of `partials`. Batch k + 1 is then not restored, and its
other members return to the queue. Apart from that the result depends only on the ledger and k, and a second rollback to
k gives the same state.
Does not own: the transaction, files, and what the core makes of it (`reload`, `state`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from asyncdapo.records.record import BadRecord, Place
from asyncdapo.replay.config import ReplayConfig
from asyncdapo.replay.core.staleness import StalenessBound
from asyncdapo.replay.core.stream import FIRST
from asyncdapo.replay.ledger.reload import saved_frames
from asyncdapo.replay.ledger.schema import HELD_STATES

LIVE_STATES = (*HELD_STATES, "trained", "filtered")
"""States that a prompt shares with its one live group."""

CUTS = " UNION ALL ".join(
    f"SELECT pos FROM {table} WHERE kind = 'cut' AND step >= :step" for table in ("events", "undone_events")
)
"""Positions at which the batch of a step or a later one was cut, in any branch. Groups that ended with a cut have its
position."""


class _Fate(NamedTuple):
    """State of a group after the rollback."""

    state: str
    step: int | None
    reason: str


class _Group(NamedTuple):
    """A group that the rollback may change: the columns of `groups` that decide."""

    group_id: int
    prompt_id: int
    min_version: int
    max_version: int
    verdict: str
    entered: str
    state: str
    step: int | None
    reason: str
    segment: int | None
    offset: int | None
    bytes: int | None
    arrived_pos: int
    changed_pos: int

    @property
    def fate(self) -> _Fate:
        """Its present state."""
        return _Fate(self.state, self.step, self.reason)


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """One rollback; call `run` once."""

    db: sqlite3.Connection
    config: ReplayConfig
    """Of the resumed run: staleness bound, `on_stale`, and whether there is a barrier."""
    replaces: bool
    """Of the resumed run: whether copies take the places of groups that aren't kept."""
    problem_with: Callable[[int, Place], str]
    """Why a payload can't be read; empty if it is as it was written."""
    step: int
    """The checkpoint's train step, k."""
    pos: int
    """Position at which batch k was trained, p; 0 for k = 0."""
    branch: int
    """Number of the branch that begins."""
    opened_pos: int
    """Position of this transaction."""
    at_s: float
    unreadable: dict[_Group, str] = field(default_factory=dict)
    """Groups that would be kept if their payload could be read, and why it can't."""

    def run(self, reason: str) -> None:
        """Undo what came after the checkpoint. `reason` is for people."""
        self.db.execute(
            "INSERT INTO branches VALUES (?, ?, ?, ?, ?, ?)",
            (self.branch, self.step, self.pos, self.opened_pos, reason, self.at_s),
        )
        in_flight, num_copies = self._in_flight(), self._num_copies()
        restored = self._decide_groups()
        next_step = self.step + 1 + restored
        self._undo_leases()
        self._undo_rest()
        cut = [(None, None, self.step + 1, num_copies, "restored")] if restored else []
        self._insert_events("cut", cut)
        unreadable = [(g.group_id, g.prompt_id, g.step, None, why) for g, why in self.unreadable.items()]
        self._insert_events("unreadable", unreadable)
        self._settle_prompts(in_flight)
        self._drop_partials(next_step)
        self._drop_unreadable_partials()

    def _insert_events(self, kind: str, rows: Sequence[tuple[int | str | None, ...]]) -> None:
        """Rows of this branch: group, prompt, step, number, detail."""
        self.db.executemany(
            "INSERT INTO events (kind, branch, pos, at_s, lease_id, prompt_id, step, number, detail)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(kind, self.branch, self.opened_pos, self.at_s, *row) for row in rows],
        )

    def _undo(self, table: str, condition: str, *parameters: object) -> None:
        """Move rows to the undone table."""
        self.db.execute(
            f"INSERT INTO undone_{table} SELECT *, {self.branch} FROM {table} WHERE {condition}", parameters
        )
        self.db.execute(f"DELETE FROM {table} WHERE {condition}", parameters)

    def _num_copies(self) -> int:
        """Copies in batch k + 1, if it was cut."""
        row = self.db.execute("SELECT number FROM events WHERE kind = 'cut' AND step = ?", (self.step + 1,)).fetchone()
        return row[0] if row else 0

    # ------------------------------------------------------------------------------------------------------ groups

    def _decide_groups(self) -> bool:
        """Decide on every group. Returns whether batch k + 1 is restored."""
        columns = ", ".join(_Group._fields)
        rows = self.db.execute(
            f"SELECT {columns} FROM groups WHERE changed_pos > :pos OR state IN {HELD_STATES}"
            f" OR (state = 'filtered' AND changed_pos IN ({CUTS})) ORDER BY group_id DESC",
            {"pos": self.pos, "step": self.step + 1},
        )
        groups = [_Group(*row) for row in rows]
        restored = self._can_restore([group for group in groups if group.step == self.step + 1])
        next_step = self.step + 1 + restored
        undone_cuts = {pos for (pos,) in self.db.execute(CUTS, {"step": next_step})}
        followed: set[int] = set()
        for group in groups:
            if restored and group.step == self.step + 1:
                fate = _Fate("cut", group.step, "")
            else:
                at_undone_cut = group.state == "filtered" and group.changed_pos in undone_cuts
                fate = self._fate(
                    group,
                    next_step,
                    followed=group.prompt_id in followed,
                    had_place=self.replaces and at_undone_cut,
                )
            if fate is None:
                self._undo("groups", "group_id = ?", group.group_id)
                continue
            followed.add(group.prompt_id)
            self.unreadable.pop(group, None)  # a group that becomes `filtered` needs no payload
            if fate != group.fate:
                self._change_group(group.group_id, fate)
        return restored

    def _can_restore(self, members: Sequence[_Group]) -> bool:
        """Whether batch k + 1 was cut and can be trained as it was."""
        return bool(members) and all(self._fits(group, self.step + 1) and self._has_payload(group) for group in members)

    def _fate(self, group: _Group, next_step: int, *, followed: bool, had_place: bool) -> _Fate | None:
        """None: the group is removed. `followed`: a later group of its prompt stays. `had_place`: a copy took its place
        in a batch that is no longer cut."""
        if group.max_version > self.step or (group.entered == "expired" and group.arrived_pos > self.pos):
            return None
        ended = group.state in ("filtered", "surplus") and group.reason != "run ended" and not had_place
        if ended or group.entered == "expired":
            return group.fate
        if (
            followed
        ):  # it expired under `requeue`, its prompt was sampled again, and only one of the two groups can stay
            return None
        fits = self._fits(group, next_step)
        if group.verdict != "kept" and (fits or group.state != "expired"):
            stays = fits and (self.replaces or next_step == self.step + 1) and self._has_payload(group)
            return _Fate("spare", None, "") if stays else _Fate("filtered", None, group.verdict)
        if not fits:
            return None if self.config.on_stale == "requeue" else _Fate("expired", None, "stale")
        return _Fate("queued", None, "") if self._has_payload(group) else None

    def _fits(self, group: _Group, step: int) -> bool:
        return StalenessBound(self.config.staleness_bound).fits(group.min_version, step)

    def _has_payload(self, group: _Group) -> bool:
        """Whether its payload is kept and can be read. If it is kept but unreadable, the reason is stored."""
        if group.segment is None or group.offset is None or group.bytes is None:
            return False
        problem = self.problem_with(group.group_id, Place(group.segment, group.offset, group.bytes))
        if problem:
            self.unreadable[group] = problem
        return not problem

    def _change_group(self, group_id: int, fate: _Fate) -> None:
        self.db.execute(
            "UPDATE groups SET state = ?, step = ?, reason = ?, changed_pos = ? WHERE group_id = ?",
            (*fate, self.opened_pos, group_id),
        )

    # --------------------------------------------------------------------------------------- leases and single rows

    def _in_flight(self) -> set[int]:
        """Prompts whose lease runs, or ran when the run ended, or of which something is saved."""
        rows = self.db.execute(
            "SELECT prompt_id FROM leases WHERE outcome IS NULL OR (outcome = 'withdrawn' AND reason = 'run ended')"
            " UNION SELECT prompt_id FROM partials"
        )
        return {prompt_id for (prompt_id,) in rows}

    def _undo_leases(self) -> None:
        self._undo(
            "leases",
            "(outcome IS NULL OR outcome = 'done' OR ended_pos > ?)"
            " AND NOT EXISTS (SELECT 1 FROM groups WHERE group_id = leases.lease_id)",
            self.pos,
        )

    def _undo_rest(self) -> None:
        """Generation batches up to step k + 1 stay closed, because the groups counted in them keep their verdicts."""
        self._undo("batches", "step > ?", self.step)
        self._undo("publishes", "pos > ?", self.pos)
        self._undo("loads", "pos > ?", self.pos)
        self._undo("events", "kind IN ('stopped', 'run_ended')")
        self._undo("events", "kind IN ('cut', 'pace_measured') AND step > ?", self.step)
        self._undo("events", "kind = 'gen_batch_closed' AND step > ?", self.step + 1)
        self._undo("events", "kind NOT IN ('cut', 'pace_measured', 'gen_batch_closed') AND pos > ?", self.pos)

    # ----------------------------------------------------------------------------------------------------- prompts

    def _settle_prompts(self, in_flight: set[int]) -> None:
        """Prompts that had no end at p, or whose group was changed: each follows its live group, or waits again."""
        rows = self.db.execute(
            f"""
            SELECT p.prompt_id, p.state, p.step, p.reason, p.attempts, p.place, p.changed_pos,
                g.state, g.step, g.reason,
                EXISTS (SELECT 1 FROM groups e
                    WHERE e.prompt_id = p.prompt_id AND e.state = 'expired' AND e.changed_pos > :pos),
                (SELECT COUNT(*) FROM leases l WHERE l.prompt_id = p.prompt_id
                    AND (l.outcome IN ('lost', 'rejected')
                        OR (:requeue AND l.outcome = 'withdrawn' AND l.reason NOT IN ('drained', 'handed back'))))
                + (SELECT COUNT(*) FROM groups e WHERE :requeue
                    AND e.prompt_id = p.prompt_id AND e.state = 'expired' AND e.changed_pos <= :pos)
            FROM prompts p LEFT JOIN groups g ON g.prompt_id = p.prompt_id AND g.state IN {LIVE_STATES}
            WHERE p.changed_pos > :pos OR g.changed_pos = :opened
                OR p.state IN {("waiting", "leased", *HELD_STATES)}""",
            {"pos": self.pos, "opened": self.opened_pos, "requeue": self.config.on_stale == "requeue"},
        ).fetchall()
        for prompt_id, *was, place, changed_pos, state, step, reason, expired, charged in rows:
            attempts = charged if changed_pos > self.pos else was[3]
            if state is not None:
                now = [state, step, reason, attempts, None]
            elif expired:
                now = ["expired", None, "stale", attempts, None]
            elif was[0] == "waiting" and changed_pos <= self.pos:
                continue
            else:
                first = place == FIRST or (prompt_id in in_flight and not self.config.synchronous)
                now = ["waiting", None, "rolled back", attempts, FIRST if first else prompt_id]
            if now != [*was, place]:
                self._change_prompt(prompt_id, now)

    def _change_prompt(self, prompt_id: int, now: Sequence[object]) -> None:
        self.db.execute(
            f"INSERT INTO undone_prompts SELECT *, {self.branch} FROM prompts WHERE prompt_id = ?", (prompt_id,)
        )
        self.db.execute(
            "UPDATE prompts SET state = ?, step = ?, reason = ?, attempts = ?, place = ?, changed_pos = ?"
            " WHERE prompt_id = ?",
            (*now, self.opened_pos, prompt_id),
        )

    def _drop_partials(self, next_step: int) -> None:
        """The tokens of a lease that ran are dropped with it: only its last save is known here."""
        oldest = StalenessBound(self.config.staleness_bound).oldest_version(next_step)
        gone = self.db.execute(
            "SELECT prompt_id, tokens, CASE WHEN max_version > :step THEN 'rolled back' ELSE 'stale' END FROM partials"
            " WHERE max_version > :step OR min_version < :oldest"
            " OR prompt_id NOT IN (SELECT prompt_id FROM prompts WHERE state = 'waiting')",
            {"step": self.step, "oldest": oldest},
        ).fetchall()
        self._insert_events("partial_dropped", [(None, prompt_id, None, num, why) for prompt_id, num, why in gone])
        self.db.executemany("DELETE FROM partials WHERE prompt_id = ?", [(prompt_id,) for prompt_id, *_ in gone])

    def _drop_unreadable_partials(self) -> None:
        for prompt_id, num_tokens in self.db.execute("SELECT prompt_id, tokens FROM partials").fetchall():
            try:
                saved_frames(self.db, prompt_id)
            except BadRecord as bad:
                self._insert_events("unreadable", [(None, prompt_id, None, None, str(bad))])
                self._insert_events("partial_dropped", [(None, prompt_id, None, num_tokens, "unreadable")])
                self.db.execute("DELETE FROM partials WHERE prompt_id = ?", (prompt_id,))
