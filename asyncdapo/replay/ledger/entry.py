"""An entry of the journal: one event of the core and the actions that it caused, as rows.

In: the event, its actions, and what the core doesn't know of them (the group that arrived, the prompts of new leases).
Out: the rows that docs/ledger.md describes, and the group's buffers in a segment before the row that points to them.
Does not own: the transaction, the disk and the order of entries (`journal`), reading rows (`reload`).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asyncdapo.messages import Group, Prompt
from asyncdapo.records.record import Place
from asyncdapo.replay.core import events as core
from asyncdapo.replay.ledger import reload
from asyncdapo.replay.ledger.payloads import Segments
from asyncdapo.replay.ledger.schema import HELD_STATES
from asyncdapo.transport.codec import Buffer
from asyncdapo.transport.payload import Payload


@dataclass(kw_only=True, slots=True)
class Entry:
    """Rows of one event. Every method is called inside a transaction."""

    db: sqlite3.Connection
    segments: Segments
    sessions: dict[int, str]
    """Session of every worker, shared by all entries: a `WorkerJoined` changes it."""
    keep_payloads: bool
    """Whether groups that are not held keep their payload, too."""
    branch: int
    position: int
    """Number of the entry in the journal."""
    at_s: float
    """Unix time of the entry."""
    arrived: tuple[Group, Payload] | None
    """Header and buffers of a `GroupDone`, until the group has its row."""
    saved: Sequence[Buffer]
    """Header and buffers of a `PartialGroup`."""
    detail: str
    """Session of a `WorkerJoined`; why a worker left, a group was rejected, its reward function failed, or what is
    saved can't be read."""

    def write(
        self,
        event: core.Event,
        actions: Sequence[core.Action],
        prompts: Sequence[Prompt],
        summary: Mapping[str, float],
    ) -> None:
        """The event, then its actions in order. `prompts`: those of the leases granted in `actions`. `summary`:
        what the learner reports of a `Trained` step."""
        self._write_event(event)
        self._insert_new_prompts(prompts)
        for action in actions:
            self._write_action(action)
        if isinstance(event, core.Trained):
            self._insert_batch(event.step, summary)

    def _insert_batch(self, step: int, summary: Mapping[str, float]) -> None:
        """The batch's row, computed from its groups, which became `trained` in this transaction."""
        copies = {group_id: num for group_id, num in reload.batch_copies(self.db, step).items() if num}
        self.db.execute(
            "INSERT INTO batches SELECT :step, :branch, :version, COUNT(*), :copies, SUM(tokens),"
            " MAX(:version - min_version), AVG(:version - min_version), AVG(reward_mean), :summary, :pos, :at_s"
            " FROM groups WHERE step = :step AND state = 'trained'",
            {
                "step": step,
                "branch": self.branch,
                "version": summary.get("learner/version", step - 1),
                "copies": json.dumps(copies),
                "summary": json.dumps({name: float(number) for name, number in summary.items()}),
                "pos": self.position,
                "at_s": self.at_s,
            },
        )

    def _write_event(self, event: core.Event) -> None:
        match event:
            case core.WorkerJoined(worker=worker, loaded_version=version, continues=continues):
                self.sessions[worker] = self.detail
                self._insert_event("worker_joined", worker=worker, number=int(continues), detail=self.detail)
                self._insert_load(worker, version)
            case core.WorkerLost(worker=worker):
                self._insert_event("worker_lost", worker=worker, detail=self.detail)
            case core.WorkerDrained(worker=worker):
                self._insert_event("worker_drained", worker=worker, detail=self.detail)
            case core.WeightsLoaded(worker=worker, version=version):
                self._insert_load(worker, version)
            case core.SamplingBegan(lease_id=lease_id, version=version):
                self.db.execute("UPDATE leases SET started_version = ? WHERE lease_id = ?", (version, lease_id))
            case core.PartialUnreadable(prompt_id=prompt_id):
                self._insert_event("unreadable", prompt_id=prompt_id, detail=self.detail)
            case core.Published(version=version):
                self.db.execute("INSERT INTO publishes VALUES (?, ?, ?, ?)", (version, self.branch, *self._stamp))
            case core.RunEnded():
                self._insert_event("run_ended")

    def _write_action(self, action: core.Action) -> None:
        match action:
            case core.GrantLease():
                self._insert_lease(action)
            case core.MovePrompt():
                self._move_prompt(action)
            case core.MoveGroup():
                self._move_group(action)
            case core.EndLease():
                self._end_lease(action)
            case core.SavePartial():
                self._save_partial(action)
            case core.DropPartial(prompt_id=prompt_id, num_lost=num_lost, reason=reason):
                self.db.execute("DELETE FROM partials WHERE prompt_id = ?", (prompt_id,))
                if num_lost:
                    self._insert_event("partial_dropped", prompt_id=prompt_id, number=num_lost, detail=reason)
            case core.CutBatch(step=step, copies=copies):
                self._insert_event("cut", step=step, number=sum(copies))
            case core.GenBatchClosed(step=step, number=number, limit_reached=reached):
                self._insert_event(
                    "gen_batch_closed", step=step, number=number, detail="limit reached" if reached else ""
                )
            case core.PaceMeasured(step=step, of_workers=workers, of_learner=learner):
                self._insert_event("pace_measured", step=step, detail=json.dumps([workers, learner]))
            case core.StopRun(reason=reason, error=error):
                self._insert_event("stopped", number=int(error), detail=reason)

    @property
    def _stamp(self) -> tuple[int, float]:
        return self.position, self.at_s

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
        self.db.execute(
            "INSERT INTO events (kind, branch, lease_id, prompt_id, worker, step, number, detail, pos, at_s)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (kind, self.branch, lease_id, prompt_id, worker, step, number, detail, *self._stamp),
        )

    def _insert_load(self, worker: int, version: int) -> None:
        self.db.execute("INSERT INTO loads VALUES (?, ?, ?, ?, ?)", (worker, version, self.branch, *self._stamp))

    # ------------------------------------------------------------------------------------ prompts, leases and groups

    def _insert_new_prompts(self, prompts: Sequence[Prompt]) -> None:
        """A prompt gets its row with its first lease, or when it is retired."""
        self.db.executemany(
            "INSERT OR IGNORE INTO prompts VALUES (?, ?, ?, ?, 'waiting', 0, NULL, '', NULL, ?)",
            [(prompt.prompt_id, prompt.epoch, prompt.source, prompt.row, self.position) for prompt in prompts],
        )

    def _insert_lease(self, action: core.GrantLease) -> None:
        session = self.sessions[action.worker]
        self.db.execute(
            "INSERT INTO leases (lease_id, prompt_id, branch, attempt, worker, session, granted_pos, granted_at_s)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (action.lease_id, action.prompt_id, self.branch, action.attempt, action.worker, session, *self._stamp),
        )
        if action.num_begun:
            self._insert_event(
                "continued",
                lease_id=action.lease_id,
                prompt_id=action.prompt_id,
                worker=action.worker,
                number=action.num_begun,
            )

    def _move_prompt(self, action: core.MovePrompt) -> None:
        moved = self.db.execute(
            "UPDATE prompts SET state = ?, attempts = ?, step = ?, reason = ?, place = ?, changed_pos = ?"
            " WHERE prompt_id = ?",
            (action.state, action.attempts, action.step, action.reason, action.place, self.position, action.prompt_id),
        )
        assert moved.rowcount == 1, f"{action} of a prompt that was never leased"

    def _end_lease(self, action: core.EndLease) -> None:
        """A late group doesn't change its lease, which had already ended."""
        if action.outcome != "late":
            self.db.execute(
                "UPDATE leases SET outcome = ?, reason = ?, ended_pos = ?, ended_at_s = ? WHERE lease_id = ?",
                (action.outcome, action.reason, *self._stamp, action.lease_id),
            )
        if action.outcome != "done":
            self._insert_event(
                action.outcome,
                lease_id=action.lease_id,
                prompt_id=action.prompt_id,
                worker=action.worker,
                detail=self.detail or action.reason,
            )

    def _save_partial(self, action: core.SavePartial) -> None:
        saved = action.partial
        self.db.execute(
            "INSERT OR REPLACE INTO partials VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(action.prompt_id, action.lease_id),
                *(saved.min_version, saved.max_version, saved.num_tokens),
                *self.saved,
                *self._stamp,
            ),
        )

    def _move_group(self, action: core.MoveGroup) -> None:
        """A group gets its row with its first move."""
        if self.arrived:
            self._insert_group(action, *self.arrived)
            self.arrived = None
            return
        moved = self.db.execute(
            "UPDATE groups SET state = ?, step = ?, reason = ?, changed_pos = ? WHERE group_id = ?",
            (action.state, action.step, action.reason, self.position, action.group_id),
        )
        assert moved.rowcount == 1, f"{action} of a group that never arrived"

    def _insert_group(self, action: core.MoveGroup, group: Group, payload: Payload) -> None:
        assert action.group_id == group.lease_id, f"{action} before that of group {group.lease_id}, which has arrived"
        held = action.state in HELD_STATES or self.keep_payloads
        place = self.segments.append(group, payload) if held else None
        row = _group_row(action, group, place, position=self.position, at_s=self.at_s)
        self.db.execute(f"INSERT INTO groups ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", [*row.values()])


def _group_row(
    action: core.MoveGroup, group: Group, place: Place | None, *, position: int, at_s: float
) -> dict[str, str | int | float | None]:
    """The row of a group that arrives in entry `position`. `place` is None if its payload isn't kept."""
    accs = group.metrics.get("acc")
    return {
        "group_id": action.group_id,
        "prompt_id": action.prompt_id,
        "lease_id": group.lease_id,
        "branch": group.branch,
        "attempt": group.attempt,
        "worker": group.worker,
        "min_version": group.min_version,
        "max_version": group.max_version,
        "verdict": action.verdict,
        "entered": action.state,
        "state": action.state,
        "step": action.step,
        "reason": action.reason,
        "completions": len(group.completions),
        "tokens": group.num_sampled_tokens,
        "truncated": group.finish_reasons["length"],
        "reward_mean": group.reward_mean,
        "acc_mean": sum(accs) / len(accs) if accs else None,
        "generate_s": group.generate_s,
        "segment": place.segment if place else None,
        "offset": place.offset if place else None,
        "bytes": place.num_bytes if place else None,
        "arrived_pos": position,
        "changed_pos": position,
        "arrived_at_s": at_s,
    }
