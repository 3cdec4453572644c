"""The conversation with the rollout workers: each of their messages is checked and becomes an event.

In: messages of peers, and ticks. Out: events for the core, evaluation requests, answers that need no event. Messages of
peers that never said hello are dropped and counted. A known worker's message is checked before the core sees it, and
no message ends the server.

    joining      a worker gets work once it has said that it has weights of the run's branch. So after a rollback
                 nothing is sampled with weights that were undone
    credits      a worker is owed `asked − granted`. Evaluation requests that wait have their share of them; the core
                 gets the rest as `Ready`; what it grants no lease for now goes to evaluation requests, too
    lost leases  a silent worker loses its leases, and joins again with its next message. A lease without progress for
                 `lease_stall_s` is lost alone
    draining     a worker that is asked to leave gets nothing more. Once it holds nothing it counts as gone. After a
                 time it hands back what it still holds, and others continue it
    over         a lease that a heartbeat reports after its end is withdrawn (again)
    unknown      leases and evaluation requests that heartbeats don't report are sent again

Memory: a session per worker, the running leases, the evaluations that somebody waits for.
Does not own: sockets, sessions as records (`sessions`), groups that come in (`arrivals`), what follows from an event
(`state`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from msgspec.structs import replace

from asyncdapo.errors import RunError
from asyncdapo.eval_messages import EvalAck, EvalAnswer, EvalDone, EvalRequest
from asyncdapo.messages import (
    SCHEMA_VERSION,
    Ask,
    GroupDone,
    GroupFailed,
    Heartbeat,
    Hello,
    Loaded,
    Message,
    Started,
    Welcome,
    Withdraw,
)
from asyncdapo.replay.core import events as core
from asyncdapo.replay.server.arrivals import Arrivals
from asyncdapo.replay.server.dispatch import Dispatch
from asyncdapo.replay.server.drains import Drains
from asyncdapo.replay.server.evaluations import Evaluation, Evaluations
from asyncdapo.replay.server.sessions import Session, Sessions
from asyncdapo.replay.server.settings import ServerSettings
from asyncdapo.transport.codec import Malformed
from asyncdapo.transport.payload import PartialGroup, unpack_answers

FromWorker = Hello | Ask | Started | Loaded | GroupDone | GroupFailed | PartialGroup | EvalDone | Heartbeat
NUM_WORKERS_MAX = 1 << 16
RECALL_HEARTBEATS = 3
"""Time for a worker to hand back its leases. It takes no longer than to send them."""
EVAL_PATIENCE = 5
"""An evaluation request without an answer for this many `lease_stall_s` is given out again."""

log = logging.getLogger("replay")


class Workers:
    """All rollout workers, as the replay server sees them."""

    def __init__(self, settings: ServerSettings, dispatch: Dispatch, sessions: Sessions, arrivals: Arrivals) -> None:
        self._dispatch, self._sessions, self._arrivals = dispatch, sessions, arrivals
        self._answered: dict[Evaluation, asyncio.Event] = {}
        self.evaluations = Evaluations(settings.eval_share)
        self._drains = Drains(sessions, self.evaluations, dispatch.send)
        self._recall_s = RECALL_HEARTBEATS * settings.replay.heartbeat_s
        self.leasing = False
        """Whether leases are granted; evaluation runs in any case."""

    def hear(self, peer: bytes, message: Message | Malformed, frames: Sequence[memoryview]) -> None:
        """One message of a peer, known or not."""
        session = self._sessions.of_peer(peer)
        if isinstance(message, Hello):
            self._greet(peer, message)
        elif session is None:
            self._arrivals.dropped["strangers"] += 1
        else:
            session.heard_tick = self._sessions.tick
            self._listen(session, message, frames)
        self._drains.note()

    def tick(self) -> None:
        """One heartbeat interval has passed: silent workers and leases without progress may be lost."""
        sessions = self._sessions
        sessions.tick += 1
        sessions.compare_paces()
        for session in sessions.silent():
            log.warning("worker %d is lost: nothing heard from it", session.worker)
            self._lose(session, "nothing heard from it")
        for lease_id in sessions.stalled():
            if lease_id in sessions.leases:  # the loss of another may have ended it
                log.warning("lease %d is lost: no progress", lease_id)
                self._dispatch.apply(core.LeaseLost(lease_id=lease_id, reason="stalled"))
        if sessions.deserted and self._dispatch.failure.empty():
            self._dispatch.failure.put_nowait("no live worker: nothing has been heard from any for long")
        self.evaluations.lose_silent(sessions.tick - EVAL_PATIENCE * sessions.stall_ticks)
        self._drains.tick()
        self._drains.note()
        self.offer_all()

    def offer_all(self) -> None:
        """Give work to every worker with room."""
        for session in self._sessions.live:
            self._offer(session)

    def pause(self) -> None:
        """Grant no further lease, not even those that workers have already asked for."""
        self.leasing = False
        for session in self._sessions.live:
            self._dispatch.apply(core.Ready(worker=session.worker, credits=0))

    def lose(self, worker: int, cause: str) -> None:
        """The worker's process is gone: its leases end at once, and nobody waits for it."""
        if session := self._sessions.of_worker(worker):
            if session.alive:
                self._lose(session, cause)
            self._sessions.forget(session)

    async def drain(self, worker: int, within_s: float, cause: str) -> int:
        """Give the worker nothing more, and wait until it holds nothing, at most `within_s`. What it hasn't finished
        then it hands back. After that it counts as gone, though its process lives. Returns the leases handed back."""
        session = self._sessions.of_worker(worker)
        if session is None or not session.alive:
            return 0
        self._dispatch.apply(core.Ready(worker=worker, credits=0))
        await self._drains.drain(session, within_s)
        num_held = len(self._sessions.held_by(worker))
        if num_held:
            await self._drains.recall([session], self._recall_s)
        if not session.alive:  # it has died meanwhile
            return 0
        session.alive = False
        self._dispatch.apply(core.WorkerDrained(worker=worker), detail=cause)
        self.evaluations.lose_worker(worker)
        self.offer_all()
        return num_held

    async def recall(self) -> None:
        """Grant no further lease, and have all leases handed back."""
        self.pause()
        await self._drains.recall(self._sessions.live, self._recall_s)

    async def roll_back(self, step: int, reason: str) -> None:
        """See `Dispatch.roll_back`. Leases are handed back before, so that what is sampled with weights that stay valid
        isn't lost. Open evaluations begin again with the first worker that joins."""
        was_leasing = self.leasing
        await self.recall()
        self.leasing = was_leasing
        self._dispatch.roll_back(step, reason)
        self.evaluations.start_again()

    async def evaluate(self, requests: Sequence[EvalRequest]) -> list[EvalAnswer]:
        """All answers, in the order of requests and prompts, once they are there. Raises RunError if it is given up."""
        evaluation = self.evaluations.start(requests)
        answered = self._answered.setdefault(evaluation, asyncio.Event())
        try:
            self.offer_all()
            if not evaluation.done:
                await answered.wait()
            if not evaluation.done:
                raise RunError("the evaluation was given up")
            return evaluation.all_answers()
        finally:
            self.evaluations.leave(evaluation)
            if not evaluation.num_callers:
                del self._answered[evaluation]
            self.offer_all()

    def give_up_evaluations(self) -> None:
        """Ask for no further answer."""
        for answered in self._answered.values():
            answered.set()

    # ----------------------------------------------------------------------------------------------------- sessions

    def _listen(self, session: Session, message: Message | Malformed, frames: Sequence[memoryview]) -> None:
        match message:
            case Malformed():
                self._arrivals.drop("malformed", session, str(message))
            case Ask(asked=asked):
                session.asked = max(session.asked, asked)
                self._offer(session)
            case Heartbeat():
                self._take_heartbeat(session, message)
            case Loaded(version=version, branch=branch):
                self._note_weights(session, version, branch)
                self._offer(session)
            case Started(lease_id=lease_id, version=version):
                self._note_started(session, lease_id, version)
            case GroupDone(group=group):
                self._arrivals.take_group(session, group, frames)
            case GroupFailed():
                self._arrivals.take_failure(session, message)
            case PartialGroup():
                self._arrivals.take_partial(session, message, frames)
            case EvalDone():
                self._take_answers(session, message, frames)

    def _greet(self, peer: bytes, hello: Hello) -> None:
        """A new session ends the worker's former one, and its leases."""
        if hello.schema != SCHEMA_VERSION or hello.worker not in range(NUM_WORKERS_MAX):
            self._arrivals.dropped["malformed"] += 1
            log.warning("%s is not welcome, this end has schema %d", hello, SCHEMA_VERSION)
            return
        if hello.branch == self._dispatch.branch and not self._exists(hello.loaded_version):
            self._arrivals.dropped["malformed"] += 1
            log.warning("%s is not welcome, the newest version is %d", hello, self._dispatch.newest_version)
            return
        session = self._sessions.recognise(peer, hello)
        if session is None:
            former = self._sessions.of_worker(hello.worker)
            if former is not None and former.alive:
                self._lose(former, "it has begun again")
            session = self._sessions.begin(peer, hello)
        self._note_weights(session, hello.loaded_version, hello.branch)
        session.heard_tick = self._sessions.tick
        self._dispatch.send(session, Welcome(branch=self._dispatch.branch, granted=session.granted))
        if self.evaluations.num_waiting:
            self.offer_all()  # with one worker more, each may get more of them
        else:
            self._offer(session)

    def _note_weights(self, session: Session, version: int, branch: int) -> None:
        """The worker generates with these weights. If they are of the run's branch, it joins, for the first time or
        again. Weights of another branch don't count. A version lower than one heard before is old news, and ignored."""
        if session.leaving or branch != self._dispatch.branch or not self._exists(version):
            return
        if branch == session.branch and self._exists(session.loaded_version):
            version = max(version, session.loaded_version)
        before, session.loaded_version, session.branch = session.loaded_version, version, branch
        if not session.alive:
            session.alive = True
            joined = core.WorkerJoined(worker=session.worker, loaded_version=version, continues=session.continues)
            self._dispatch.apply(joined, detail=session.name)
        elif version != before:
            self._dispatch.apply(core.WeightsLoaded(worker=session.worker, version=version))

    def _lose(self, session: Session, cause: str) -> None:
        session.alive = False
        self._dispatch.apply(core.WorkerLost(worker=session.worker), detail=cause)
        self.evaluations.lose_worker(session.worker)

    def _take_heartbeat(self, session: Session, heartbeat: Heartbeat) -> None:
        found = self._sessions.note_heartbeat(session, heartbeat)
        if found.over:
            self._dispatch.send(session, Withdraw(lease_ids=found.over))
        for lease_id in found.unlisted:
            self._dispatch.send_again(lease_id)
        for request in self.evaluations.note_listed(session.worker, heartbeat.evaluations):
            self._dispatch.send(session, replace(request, number=session.granted))
        for lease_id, version in found.started:
            self._note_started(session, lease_id, version)
        self._note_weights(session, heartbeat.loaded_version, heartbeat.branch)
        self._offer(session)

    def _note_started(self, session: Session, lease_id: int, version: int) -> None:
        if self._sessions.holds(session, lease_id) and self._exists(version):
            self._sessions.leases[lease_id].started = True
            self._dispatch.apply(core.SamplingBegan(lease_id=lease_id, version=version))

    def _offer(self, session: Session) -> None:
        if not session.alive or session.leaving:
            return
        worker, tick = session.worker, self._sessions.tick
        while session.owed and (request := self.evaluations.next_in_turn(worker, tick, session.owed)):
            self._send_request(session, request)
        self._say_ready(session)
        left = session.owed
        while session.owed and (request := self.evaluations.next_for(worker, tick)):
            self._send_request(session, request)
        if session.owed < left:
            self._say_ready(session)

    def _send_request(self, session: Session, request: EvalRequest) -> None:
        """Use one of the worker's credits for it."""
        session.granted += 1
        self._dispatch.send(session, replace(request, number=session.granted))

    def _say_ready(self, session: Session) -> None:
        """Let the core grant leases for the credits that are left."""
        if self.leasing:
            before = session.granted
            self._dispatch.apply(core.Ready(worker=session.worker, credits=session.owed, pace=session.relative_pace))
            self.evaluations.note_leases(session.granted - before)

    # ----------------------------------------------------------------------------------------------------- evaluations

    def _take_answers(self, session: Session, done: EvalDone, frames: Sequence[memoryview]) -> None:
        """Bad answers are dropped, and their request is given out again when it is due. So are the answers of a worker
        whose weights are of another branch: they were asked for before a rollback."""
        self._dispatch.send(session, EvalAck(request_id=done.request_id))
        if session.branch != self._dispatch.branch:
            return
        try:
            evaluation = self.evaluations.answer(done.request_id, unpack_answers(done, frames))
        except ValueError as problem:
            self._arrivals.drop("rejected", session, str(problem))
            return
        if evaluation is None:
            return
        self._sessions.note_answer(session, self._dispatch.accounts.count_evaluation(done.answers))
        if evaluation.done:
            self._answered[evaluation].set()
        self.offer_all()

    def _exists(self, version: int) -> bool:
        return 0 <= version <= self._dispatch.newest_version
