"""One event in, one transaction, then its messages out.

In: events, with what the core doesn't know of them. Out: rows in the journal, then messages to workers and learner, in
the order of the events. `apply` does not pause, so two events never mix. Its messages are queued after the commit: a
group is acknowledged after it is in the journal, and a batch is sent after its cut is written.

It starts where the ledger ends, whether the ledger is new, of a server that was killed, or was rolled back just now.
The peers report again what the ledger doesn't know: credits, peers, and the batch that the learner wants.

Owns: the core's state, which a rollback replaces; the running leases (kept by the sessions); the learner's ranks that
wait for a batch. Does not own: sockets, what messages mean (`workers`), what follows from an event (`state`).
Memory: a batch is made when it is wanted, aside, of headers alone (`headers`).
`outgoing` is emptied as fast as the socket takes messages; a peer is sent only answers to what it sent or asked for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from asyncdapo.errors import RunError
from asyncdapo.messages import Ack, Group, Lease, Message, Prompt, Reject, Withdraw
from asyncdapo.records.record import BadRecord
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.recovery import Recovered
from asyncdapo.replay.core.state import ReplayState
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.server.accounts import Accounts
from asyncdapo.replay.server.failures import Failures
from asyncdapo.replay.server.headers import Headers
from asyncdapo.replay.server.sessions import HeldLease, Session, Sessions
from asyncdapo.replay.server.settings import ServerSettings
from asyncdapo.seeds import sample_seed
from asyncdapo.shares import Batch, CutWanted, Deal, NoBatch
from asyncdapo.transport.codec import Buffer
from asyncdapo.transport.payload import Payload

MakeState = Callable[[Recovered], ReplayState]

log = logging.getLogger("replay")


@dataclass(frozen=True)
class Letter:
    """A message to send to a worker."""

    peer: bytes
    message: Message
    frames: Sequence[Buffer] = ()


@dataclass(frozen=True)
class Answer:
    """To a rank of the learner. A batch is made in a thread when it is sent, and nobody waits for that."""

    peer: bytes
    make: Callable[[], Batch | NoBatch]


class Dispatch:
    """Joins the core to the journal, the accounts and the queue of outgoing messages."""

    def __init__(
        self,
        settings: ServerSettings,
        make_state: MakeState,
        journal: Journal,
        sessions: Sessions,
        prompt_at: Callable[[int], Prompt | None],
    ) -> None:
        """Resumes where the ledger ends. `make_state`, `prompt_at`: see `ReplayServer`."""
        self._settings, self._make_state, self._prompt_at = settings, make_state, prompt_at
        self._journal, self._sessions = journal, sessions
        self.failures = Failures(settings.max_failure_ratio)
        self.outgoing: asyncio.Queue[Letter] = asyncio.Queue()
        self.answers: asyncio.Queue[Answer] = asyncio.Queue()
        self.failure: asyncio.Queue[str] = asyncio.Queue()
        """Why the run can't continue."""
        recovered = journal.recover()
        self.accounts = Accounts(settings.totals, recovered)
        self.first_lease_at_s = recovered.first_lease_at_s
        self.state = make_state(recovered)
        self._wanted: dict[int, tuple[bytes, CutWanted]] = {}
        """What each rank of the learner waits for."""
        self._headers = Headers(journal, settings.dealer)
        self._no_batch: str | None = None
        """Why no batch follows, if none does."""
        self._finished = False
        self._resume_from(recovered)
        for worker, known in recovered.workers.items():
            sessions.recover(worker, known, self.branch)

    @property
    def branch(self) -> int:
        return self._journal.branch

    @property
    def newest_version(self) -> int:
        """No weights can be newer: version k is trained on batch k, which has to be cut first."""
        return self.state.next_batch.step - 1

    def apply(
        self,
        event: core.Event,
        *,
        arrived: tuple[Group, Payload] | None = None,
        saved: Sequence[Buffer] = (),
        detail: str = "",
        summary: Mapping[str, float] | None = None,
    ) -> None:
        """Let the core handle the event, commit what follows, then queue the messages. Parameters: `Journal.write`."""
        actions = self.state.handle(event)
        prompts = {
            action.prompt_id: self._prompt(action.prompt_id)
            for action in actions
            if isinstance(action, core.GrantLease)
            or (isinstance(action, core.MovePrompt) and action.state == "retired")
        }
        self._journal.write(
            event, actions, prompts=list(prompts.values()), arrived=arrived, saved=saved, detail=detail, summary=summary
        )
        for action in actions:
            match action:
                case core.GrantLease():
                    self._grant(action, prompts[action.prompt_id])
                case core.EndLease():
                    self._end_lease(action, detail)
                case core.DropPartial():
                    self.accounts.drop_partial(action)
                case core.MoveGroup():
                    self.accounts.move_group(action, arrived[0] if arrived else None)
                    self._headers.move(action, arrived[0] if arrived else None)
                case core.CutBatch():
                    self._answer_learner()
                case core.GenBatchClosed():
                    self.accounts.close_gen_batch()
                case core.StopRun():
                    self._stop(action)

    @contextmanager
    def together(self) -> Iterator[None]:
        """The events of the body are one transaction. Nothing pauses here, so their messages leave after it; if it
        fails, none leaves."""
        try:
            with self._journal.together():
                yield
        except BaseException:
            for queue in (self.outgoing, self.answers):
                while not queue.empty():
                    queue.get_nowait()
            raise

    def send(self, session: Session, message: Message, frames: Sequence[Buffer] = ()) -> None:
        """Queue a message to a worker, behind all earlier ones. It is dropped if the worker hasn't said hello yet:
        afterwards the worker is sent again whatever it needs."""
        if session.peer:
            self.outgoing.put_nowait(Letter(session.peer, message, frames))

    def roll_back(self, step: int, reason: str) -> None:
        """Go back to the checkpoint of `step` and begin a new branch. Every lease is over, and the core resumes from
        what the ledger keeps. No worker has joined the new branch yet."""
        for session in self._sessions.known:
            session.alive = False
            if held := self._sessions.held_by(session.worker):
                self.send(session, Withdraw(lease_ids=list(held)))
        self._journal.roll_back(step, reason, self.state.config, replaces=self.state.filter.replaces)
        held, num_saved = self._sessions.leases.values(), self.state.leases.partials.num_tokens
        self.accounts.undo_leases(sum(lease.num_tokens - num_saved(lease.prompt.prompt_id) for lease in held))
        recovered = self._journal.recover()
        self.accounts.resume_from(recovered)
        self.state = self._make_state(recovered)
        self._wanted.clear()
        self._headers = Headers(self._journal, self._settings.dealer)
        self._resume_from(recovered)

    def _resume_from(self, recovered: Recovered) -> None:
        """Take over the run's end, if the ledger has one, and its open leases."""
        self._no_batch = "the run is over" if recovered.over else None
        self._finished = recovered.over and recovered.stop is None
        if recovered.stop:
            self._stop(recovered.stop)
        self._sessions.leases = {
            lease.lease_id: HeldLease(
                prompt=self._prompt(lease.prompt_id),
                worker=lease.worker,
                attempt=lease.attempt,
                progress_tick=self._sessions.tick,
                num_tokens=self.state.leases.partials.num_tokens(lease.prompt_id),
                started=lease.started_version is not None,
            )
            for lease in recovered.leases
        }

    # ------------------------------------------------------------------------------------------------------ learner

    def want_batch(self, peer: bytes, wanted: CutWanted) -> None:
        """A rank of the learner asks for its batch, perhaps again, perhaps as another peer. A batch that was cut before
        is sent unchanged."""
        self._wanted[wanted.rank] = peer, wanted
        if wanted.step not in self.state.cut_batches.untrained and not self._no_batch:
            self.apply(core.BatchWanted(step=wanted.step))
        self._answer_learner()

    def trained(self, step: int, summary: Mapping[str, float]) -> dict[str, float]:
        """The batch was trained on. Returns the metrics of its step. A repeated call changes nothing else."""
        if step in self.state.cut_batches.untrained:
            self.apply(core.Trained(step=step), summary=summary)
        elif step >= self.state.next_batch.step:
            raise RunError(f"step {step} is said to be trained, but batch {step} was never cut in branch {self.branch}")
        return self.accounts.trained(step, self._journal.batch_facts(step), self._journal.num_copies(step))

    def published(self, version: int) -> None:
        """The send of `version` is over. A repeated call changes nothing."""
        if any(step <= version for step in self.state.cut_batches.in_training):
            self.apply(core.Published(version=version))

    def finish(self) -> None:
        """No further step. A repeated call changes nothing."""
        if not self._finished:
            self._finished = True
            self.apply(core.RunEnded())

    def _answer_learner(self) -> None:
        for rank, (peer, wanted) in list(self._wanted.items()):
            if wanted.step in self.state.cut_batches.untrained:
                make = self._maker(wanted.step)
            elif self._no_batch:
                make = partial(NoBatch, step=wanted.step, reason=self._no_batch)
            else:
                continue
            self.answers.put_nowait(Answer(peer, make))
            del self._wanted[rank]

    def _maker(self, step: int) -> Callable[[], Batch | NoBatch]:
        batches = self.state.cut_batches
        bare = Batch(
            step=step,
            branch=self.branch,
            max_staleness=self.state.bound.max_staleness,
            groups=[],
            deal=Deal(updates=[], ranks=[]),
            copies=list(batches.copies.get(step, ())),
        )
        members = [group.group_id for group in batches.untrained[step]]
        places = dict(zip(members, self._journal.places(members), strict=True))
        return partial(self._headers.batch, bare, places)

    def _stop(self, stop: core.StopRun) -> None:
        if stop.error:
            self.failure.put_nowait(stop.reason)
        else:
            self._no_batch = stop.reason
            self._answer_learner()

    # ------------------------------------------------------------------------------------------------------- leases

    def send_again(self, lease_id: int) -> None:
        """The worker does not know of its lease: the message was lost."""
        self._send_lease(lease_id, self._sessions.leases[lease_id])

    def _prompt(self, prompt_id: int) -> Prompt:
        prompt = self._prompt_at(prompt_id)
        assert prompt is not None, f"prompt {prompt_id} is beyond the end of the prompt stream"
        return prompt

    def _session(self, worker: int) -> Session:
        session = self._sessions.of_worker(worker)
        assert session is not None, f"worker {worker} has a lease and no session"
        return session

    def _grant(self, action: core.GrantLease, prompt: Prompt) -> None:
        session = self._session(action.worker)
        session.granted += 1
        self.first_lease_at_s = self.first_lease_at_s or time.time()
        lease = self._sessions.leases[action.lease_id] = HeldLease(
            prompt=prompt,
            worker=action.worker,
            attempt=action.attempt,
            number=session.granted,
            progress_tick=self._sessions.tick,
            num_tokens=action.num_begun,
        )
        self._send_lease(action.lease_id, lease)
        self.accounts.count_begun(lease.num_tokens)

    def _send_lease(self, lease_id: int, lease: HeldLease) -> None:
        message = Lease(
            lease_id=lease_id,
            branch=self.branch,
            number=lease.number,
            attempt=lease.attempt,
            group_size=self._settings.group_size,
            seed=sample_seed(self._settings.seed, lease.prompt.prompt_id),
            prompt=lease.prompt,
        )
        self.send(self._session(lease.worker), message, self._sampled_before(lease_id, lease))

    def _sampled_before(self, lease_id: int, lease: HeldLease) -> Sequence[Buffer]:
        """What the lease continues. It begins anew if that was damaged since it was saved."""
        prompt_id = lease.prompt.prompt_id
        try:
            return self._journal.read_partial(prompt_id, lease_id)
        except BadRecord as bad:
            log.warning("%s; it is sampled again", bad)
            self.apply(core.PartialUnreadable(prompt_id=prompt_id), detail=str(bad))
            lease.num_tokens = 0
            return ()

    def _end_lease(self, action: core.EndLease, detail: str) -> None:
        """Tell the worker how its lease ended. `workers` answers a late group: it knows the sender."""
        if too_many := self.failures.count(action.outcome, detail):
            self.failure.put_nowait(too_many)
        lease = self._sessions.leases.pop(action.lease_id, None)
        self.accounts.end_lease(action, lease.num_tokens if lease else 0)
        if lease is None:
            return
        session = self._session(lease.worker)
        match action.outcome:
            case "done" | "failed":
                session.num_stalled = 0
                self.send(session, Ack(lease_id=action.lease_id))
            case "withdrawn" | "lost":
                session.num_stalled += action.reason == "stalled"
                self.send(session, Withdraw(lease_ids=[action.lease_id]))
            case "rejected":
                self.send(session, Reject(lease_id=action.lease_id, reason=detail))
