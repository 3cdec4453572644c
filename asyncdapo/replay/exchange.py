"""One event in, one transaction, then its messages out.

In: events, with what the core doesn't know of them. Out: rows in the journal, then messages to workers and learner, in
the order of the events. `apply` does not pause, so no two events mix; what it wants sent stands in one queue behind the
commit. So a group is acknowledged after the journal has it, and a batch is sent after its cut is written.

Owns: the leases that run (as sessions hold them), batches that are cut and not trained, and the learner that waits for
one. Does not own: sockets, what messages mean (`workers`), what follows from an event (`state`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from asyncdapo.messages import (
    Ack,
    Batch,
    Group,
    Lease,
    Message,
    NoBatch,
    Payload,
    Prompt,
    Reject,
    Withdraw,
    sample_seed,
)
from asyncdapo.replay import events as core
from asyncdapo.replay.accounts import Accounts
from asyncdapo.replay.journal import Journal
from asyncdapo.replay.sessions import HeldLease, Session, Sessions
from asyncdapo.replay.state import ReplayState

MAX_BAD_LEASES = 100
"""Leases in a row that may end failed or rejected before the run does."""


@dataclass(frozen=True)
class Letter:
    """A message on its way out. `to_learner` says by which socket."""

    peer: bytes
    message: Message
    frames: Sequence[bytes] = ()
    to_learner: bool = False


class Exchange:
    """Joins the core to the journal, the accounts and the queue of outgoing messages."""

    def __init__(
        self,
        state: ReplayState,
        journal: Journal,
        sessions: Sessions,
        prompt_at: Callable[[int], Prompt | None],
        *,
        group_size: int,
        seed: int,
        staleness_bound: int,
    ) -> None:
        self._state, self._journal, self._sessions, self._prompt_at = state, journal, sessions, prompt_at
        self._group_size, self._seed, self._staleness_bound = group_size, seed, staleness_bound
        self._batches: dict[int, tuple[Batch, Sequence[bytes]]] = {}
        self._learner: tuple[bytes, int] | None = None
        self._no_batch: str | None = None
        self.accounts = Accounts()
        self.outgoing: asyncio.Queue[Letter] = asyncio.Queue()
        self.failure: asyncio.Queue[str] = asyncio.Queue()
        """Why the run can't go on."""
        self.newest_version = 0
        """No weights are newer: version k is made of batch k, which was cut."""
        self.first_lease_at_s: float | None = None
        self._num_bad = 0
        """Leases in a row that ended failed or rejected."""

    @property
    def branch(self) -> int:
        return self._journal.branch

    def apply(
        self,
        event: core.Event,
        *,
        arrived: tuple[Group, Payload] | None = None,
        detail: str = "",
        summary: Mapping[str, float] | None = None,
    ) -> None:
        """Let the core handle the event, commit what follows, then queue its messages. See `Journal.write`."""
        actions = self._state.handle(event)
        prompts = {action.prompt_id: self._prompt(action) for action in actions if isinstance(action, core.GrantLease)}
        self._journal.write(
            event, actions, prompts=list(prompts.values()), arrived=arrived, detail=detail, summary=summary
        )
        for action in actions:
            match action:
                case core.GrantLease():
                    self._send_lease(action, prompts[action.prompt_id])
                case core.EndLease():
                    self._end_lease(action, detail)
                case core.MoveGroup():
                    self.accounts.move_group(action, arrived[0] if arrived else None)
                case core.CutBatch():
                    self._hold_batch(action)
                case core.StopRun():
                    self._stop(action)

    def send(self, session: Session, message: Message) -> None:
        """Queue a message to a worker, behind all that went before."""
        self.outgoing.put_nowait(Letter(session.peer, message))

    # ------------------------------------------------------------------------------------------------------ learner

    def want_batch(self, peer: bytes, step: int) -> None:
        """The learner asks, perhaps again: a batch that was cut is sent as it is."""
        self._learner = peer, step
        if step not in self._batches and not self._no_batch:
            self.apply(core.CutWanted(step=step))
        self._answer_learner()

    def trained(self, step: int, summary: Mapping[str, float]) -> dict[str, float]:
        """The batch is trained on and forgotten. Returns the metrics of its step."""
        self.apply(core.Trained(step=step), summary=summary)
        del self._batches[step]
        return self.accounts.trained(step)

    def _hold_batch(self, action: core.CutBatch) -> None:
        groups, payloads = zip(*map(self._journal.read, action.group_ids), strict=True)
        batch = Batch(step=action.step, branch=self.branch, max_staleness=self._staleness_bound, groups=list(groups))
        self._batches[action.step] = batch, Payload.join(payloads).frames()
        self.newest_version = action.step
        self._answer_learner()

    def _answer_learner(self) -> None:
        if self._learner is None:
            return
        peer, step = self._learner
        if step in self._batches:
            self.outgoing.put_nowait(Letter(peer, *self._batches[step], to_learner=True))
        elif self._no_batch:
            self.outgoing.put_nowait(Letter(peer, NoBatch(step=step, reason=self._no_batch), to_learner=True))
        else:
            return
        self._learner = None

    def _stop(self, action: core.StopRun) -> None:
        if action.error:
            self.failure.put_nowait(action.reason)
        else:
            self._no_batch = action.reason
            self._answer_learner()

    # ------------------------------------------------------------------------------------------------------- leases

    def _prompt(self, action: core.GrantLease) -> Prompt:
        prompt = self._prompt_at(action.prompt_id)
        assert prompt is not None, f"{action} is beyond the end of the prompt stream"
        return prompt

    def _send_lease(self, action: core.GrantLease, prompt: Prompt) -> None:
        session = self._sessions.of_worker(action.worker)
        session.granted += 1
        self._sessions.leases[action.lease_id] = HeldLease(
            prompt=prompt, worker=action.worker, attempt=action.attempt, progress_tick=self._sessions.tick
        )
        if self.first_lease_at_s is None:
            self.first_lease_at_s = time.time()
        lease = Lease(
            lease_id=action.lease_id,
            branch=self.branch,
            attempt=action.attempt,
            group_size=self._group_size,
            seed=sample_seed(self._seed, action.prompt_id),
            prompt=prompt,
        )
        self.send(session, lease)

    def _count_bad(self, action: core.EndLease, detail: str) -> None:
        """A verifier or a worker that never works would use up the data in silence; the run ends with its words."""
        if action.outcome == "done":
            self._num_bad = 0
        elif action.outcome in ("failed", "rejected"):
            self._num_bad += 1
            if self._num_bad == MAX_BAD_LEASES:
                self.failure.put_nowait(f"{MAX_BAD_LEASES} groups in a row failed or were rejected, the last: {detail}")

    def _end_lease(self, action: core.EndLease, detail: str) -> None:
        """Tell the worker how its lease ended. Who sent a late group is known to `workers`, not here."""
        self._count_bad(action, detail)
        lease = self._sessions.leases.pop(action.lease_id, None)
        self.accounts.end_lease(action, lease.num_tokens if lease else 0)
        if lease is None:
            return
        session = self._sessions.of_worker(lease.worker)
        match action.outcome:
            case "done" | "failed":
                self.send(session, Ack(lease_id=action.lease_id))
            case "withdrawn" | "lost":
                self.send(session, Withdraw(lease_ids=[action.lease_id]))
            case "rejected":
                self.send(session, Reject(lease_id=action.lease_id, reason=detail))
