"""Rollout worker: turns leases into scored groups, and keeps its slots full while it has credit.

    replay ──Lease, EvalRequest──▶ receive ──▶ a task each: generate, score ──▶ outbox ──▶ send ──GroupDone, EvalDone──▶
           ──Ack, Reject, Withdraw, EvalAck──▶ receive: it is over          ──Recall──▶ it goes back as it is
           ◀──Hello, Ask, Started, Loaded, PartialGroup, Heartbeat── send

Owns: its session, its credits, its outbox. Does not own: the engine (its owner starts and stops it), turns and scores,
the weight transfer, and what happens to a group. One task receives, one sends, and each job is a task. All are in one
task group, so that the first failure ends `run` with that error. Only the send task sends; the others change state and
wake it.

Until the server answers `Welcome`, only `Hello` is sent. If the server is silent for `QUIET_HEARTBEATS` heartbeats, the
link may be lost, or the server may have restarted and can't reach a peer that it doesn't know. The worker then repeats
`Hello` with every heartbeat until it gets a `Welcome`. Messages in the outbox are sent again every `RESEND_HEARTBEATS`
until they are acknowledged, rejected or withdrawn.

A rollback of the run ends everything begun before it. The worker learns of it from `Welcome` or with the weights of the
new branch, whichever comes first. From then on it sends nothing that it held before.

Memory: jobs and the outbox hold only what was granted and isn't over, so at most what the slots can start. The ids of
the last `REMEMBERED` ended leases are kept, since messages may be repeated.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from asyncdapo import faults
from asyncdapo.errors import RunError, first_of
from asyncdapo.eval_messages import EvalAck, EvalRequest
from asyncdapo.messages import (
    SCHEMA_VERSION,
    Ack,
    Ask,
    Heartbeat,
    Hello,
    Lease,
    Loaded,
    Message,
    Recall,
    Reject,
    Started,
    Welcome,
    Withdraw,
)
from asyncdapo.rollout.account import WorkerAccount
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.credits import Credits
from asyncdapo.rollout.engine import Engine, LoadTimes
from asyncdapo.rollout.episodes import Decode, Rollouts
from asyncdapo.rollout.job import Job
from asyncdapo.rollout.jobs import Jobs, Outgoing
from asyncdapo.rollout.partials import Saved, Saver
from asyncdapo.transport.codec import Buffer, Malformed
from asyncdapo.transport.delivery import Outbox
from asyncdapo.transport.keys import ClientKeys
from asyncdapo.transport.sockets import Client

QUIET_HEARTBEATS = 3
RESEND_HEARTBEATS = 2
REMEMBERED = 4096
"""Number of ended leases whose ids are kept. If an older `Lease` is repeated, it is generated again, until the server
answers a heartbeat that it is over."""
MAX_MALFORMED = 10
"""Undecodable messages from the server that are skipped in a row; one more ends the worker."""

Incoming = Welcome | Lease | Ack | Reject | Withdraw | Recall | EvalRequest | EvalAck
Key = tuple[str, int]
"""("lease", lease_id) or ("eval", request_id)."""

log = logging.getLogger("rollout")


class RolloutWorker:
    """One worker: an engine and what judges, joined to the replay server."""

    def __init__(
        self,
        index: int,
        config: RolloutConfig,
        heartbeat_s: float,
        engine: Engine,
        rollouts: Rollouts,
        decode: Decode,
        address: str,
        *,
        curve: ClientKeys | None = None,
        overlong_filter: bool = False,
    ) -> None:
        """`rollouts`: samples with the engine. `index`: the worker's number in records. `address`: the replay server's,
        "tcp://host:port". `overlong_filter`: completions cut off at the length limit bear no loss."""
        self._index, self._heartbeat_s = index, heartbeat_s
        self._engine, self._rollouts = engine, rollouts
        self._address, self._curve = address, curve
        self._session = secrets.token_hex(8)
        self._wake = asyncio.Event()
        self._tasks = asyncio.TaskGroup()

        self._jobs = Jobs(index, config, rollouts, decode, self._wake.set, overlong_filter=overlong_filter)
        self._held: dict[int, Job] = {}
        """Leases that aren't over, by `lease_id`."""
        self._over: dict[int, None] = {}
        """The latest `REMEMBERED` leases that are over, in the order in which they ended."""
        self._running: dict[Key, tuple[Job, asyncio.Task[None]]] = {}
        self._credits = Credits(config.group_size)
        self.account = WorkerAccount(engine)
        self._outbox: Outbox[Key] = Outbox(RESEND_HEARTBEATS * heartbeat_s)
        self._news: list[Outgoing] = []
        """Messages that are sent once."""
        self._saver = Saver(rollouts.so_far, config.save_partials_s, heartbeat_s, self._tasks, self._take_saved)

        self._welcomed = False
        self._heard_at = self._hello_at = self._heartbeat_at = -math.inf
        self._branch = self._newest_branch = 0
        """Branch of the loaded weights, and of the run as far as this worker knows."""
        self._announced = (-1, 0)
        """Version and branch of the weights that the server was last told."""
        self._counts: Counter[str] = Counter()
        self._num_malformed = 0
        """Undecodable messages in a row."""

    async def run(self) -> None:
        """Work until cancelled. Call it once. Raises the first error of any task: EngineError, RunError past
        `MAX_MALFORMED`."""
        identity = f"rollout-{self._index}-{self._session}".encode()
        client: Client[Incoming] = Client(self._address, Incoming, identity, curve=self._curve)
        try:
            async with self._tasks:
                self._tasks.create_task(self._receive(client))
                self._tasks.create_task(self._send(client))
        except BaseExceptionGroup as errors:
            raise first_of(errors) from None
        finally:
            client.close()

    async def load_weights(self, version: int, weights: Any, branch: int = 0) -> LoadTimes:
        """Switch to these weights between two tokens, tell the server, and return. Weights of a newer branch end
        everything that the worker holds."""
        faults.point("in_load_weights")
        with self.account.loading():
            times = await self._engine.load_weights(version, weights)
        self._note_branch(branch)
        self._branch = branch
        self._wake.set()
        return times

    @property
    def num_running(self) -> int:
        """Leases and evaluation requests that are being sampled or judged."""
        return len(self._running)

    def gauges(self) -> dict[str, float]:
        """Counters since the session began: the engine's, the jobs', and the worker's own of leases and messages."""
        own = {key: self._counts[key] for key in ("rejected_groups", "withdrawn_groups", "malformed")}
        own["resent"] = self._outbox.num_resent
        return self._engine.gauges() | self._jobs.gauges() | self.account.gauges() | own

    # ------------------------------------------------------------------------------------------------------- receive

    async def _receive(self, client: Client[Incoming]) -> None:
        while True:
            try:
                message, frames = await client.receive()
                self._handle(message, frames)
            except Malformed as malformed:
                self._count_malformed(malformed)
                continue
            self._num_malformed, self._heard_at = 0, time.monotonic()
            self._wake.set()

    def _count_malformed(self, malformed: Malformed) -> None:
        self._counts["malformed"] += 1
        self._num_malformed += 1
        log.warning("undecodable message from the replay server: %s", malformed)
        if self._num_malformed > MAX_MALFORMED:
            problem = f"more than {MAX_MALFORMED} undecodable messages from the replay server in a row"
            raise RunError(problem) from malformed

    def _handle(self, message: Incoming, frames: Sequence[Buffer]) -> None:
        match message:
            case Welcome(branch=branch, granted=granted):
                self._welcomed = True
                self._credits.resume_from(granted)
                self._note_branch(branch)
            case Lease():
                self._take_lease(message, frames)
            case EvalRequest():
                self._take_evaluation(message)
            case Ack(lease_id=lease_id):
                self._end_lease(lease_id, arrived=True)
            case Reject(lease_id=lease_id, reason=reason):
                log.warning("the group of lease %d was rejected: %s", lease_id, reason)
                self._counts["rejected_groups"] += self._end_lease(lease_id)
            case Withdraw(lease_ids=lease_ids):
                self._counts["withdrawn_groups"] += sum(self._end_lease(lease_id) for lease_id in lease_ids)
            case Recall(lease_ids=lease_ids):
                self._saver.hand_back([self._held[lease_id] for lease_id in lease_ids if lease_id in self._held])
            case EvalAck(request_id=request_id):
                self._outbox.acknowledge(("eval", request_id))

    def _take_lease(self, lease: Lease, frames: Sequence[Buffer]) -> None:
        """Begin a lease. If it is held or over, the message is a repeat."""
        self._credits.resume_from(lease.number)
        if lease.lease_id in self._held or lease.lease_id in self._over:
            return
        faults.point("after_lease")
        job = self._held[lease.lease_id] = self._jobs.for_lease(lease, self._note_started, frames)
        self._begin(("lease", lease.lease_id), job)

    def _take_evaluation(self, evaluation: EvalRequest) -> None:
        """Begin an evaluation request. If it runs or waits for its acknowledgement, the message is a repeat. A request
        that is over is done again."""
        self._credits.resume_from(evaluation.number)
        key = ("eval", evaluation.request_id)
        if key not in self._running and key not in self._outbox:
            self._begin(key, self._jobs.for_evaluation(evaluation))

    def _begin(self, key: Key, job: Job) -> None:
        task = self._tasks.create_task(self._complete(key, job))
        self._running[key] = job, task
        task.add_done_callback(lambda _: self._note_end(key))

    async def _complete(self, key: Key, job: Job) -> None:
        answer = await self._jobs.complete(job)
        await faults.slow_worker()
        faults.point("before_send_group")
        self._outbox.put(key, *answer)

    def _note_started(self, lease: Lease, version: int) -> None:
        self._send_once(Started(lease_id=lease.lease_id, version=version))

    def _send_once(self, message: Message, frames: Sequence[Buffer] = ()) -> None:
        self._news.append((message, frames))
        self._wake.set()

    def _take_saved(self, saved: Saved) -> None:
        """Send what is sampled of a lease that still runs. One that is handed back ends here."""
        key = ("lease", saved[0].lease_id)
        if key not in self._running:
            return
        if saved[0].handed_back:
            self._stop(key)
            self._outbox.put(key, *saved)
            self._wake.set()
        else:
            self._send_once(*saved)

    def _note_end(self, key: Key) -> None:
        del self._running[key]
        self._wake.set()

    def _end_lease(self, lease_id: int, *, arrived: bool = False) -> bool:
        """Stop its task, and send nothing more for it. False if it was over before."""
        self._stop(("lease", lease_id))
        self._over[lease_id] = None
        if len(self._over) > REMEMBERED:
            del self._over[next(iter(self._over))]
        job = self._held.pop(lease_id, None)
        if job and not (arrived and job.scored):
            self.account.count_late(job)
        return job is not None

    def _stop(self, key: Key) -> None:
        if key in self._running:
            self._running[key][1].cancel()
        self._outbox.acknowledge(key)

    def _note_branch(self, branch: int) -> None:
        """If the run was rolled back, drop everything begun before, evaluations included. The server gives work of the
        new branch only after this worker has loaded its weights, so everything held now is older."""
        if branch <= self._newest_branch:
            return
        self._newest_branch = branch
        for lease_id in list(self._held):
            self._end_lease(lease_id)
        for key, (job, _) in list(self._running.items()):
            self.account.count_late(job)
            self._stop(key)
        self._outbox.clear()
        self._news.clear()

    # ---------------------------------------------------------------------------------------------------------- send

    async def _send(self, client: Client[Incoming]) -> None:
        while True:
            self._wake.clear()
            self.account.note([job for job, _ in self._running.values()], len(self._outbox))
            now = time.monotonic()
            self._welcomed &= now - self._heard_at <= QUIET_HEARTBEATS * self._heartbeat_s
            for message, frames in self._due(now) if self._welcomed else self._hello(now):
                await client.send(message, frames)
                if frames:
                    faults.point("after_send_group")
            next_at = self._heartbeat_at if self._welcomed else self._hello_at
            alarm = asyncio.get_running_loop().call_later(next_at - time.monotonic(), self._wake.set)
            await self._wake.wait()
            alarm.cancel()

    def _hello(self, now: float) -> list[Outgoing]:
        if now < self._hello_at:
            return []
        self._hello_at = now + self._heartbeat_s
        self._announced = version, branch = self._loaded
        hello = Hello(
            schema=SCHEMA_VERSION,
            worker=self._index,
            session=self._session,
            loaded_version=version,
            branch=branch,
            granted=self._credits.granted,
            continues=self._rollouts.continues,
        )
        return [(hello, ())]

    def _due(self, now: float) -> list[Outgoing]:
        """The messages to send now: news, credits, the heartbeat, and answers that aren't acknowledged."""
        news, self._news = self._news, []
        if self._loaded != self._announced:
            self._announced = version, branch = self._loaded
            news.append((Loaded(version=version, branch=branch), ()))
        if self._credits.ask(self._rollouts.num_free([job for job, _ in self._running.values()])):
            news.append((Ask(asked=self._credits.asked), ()))
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + self._heartbeat_s
            news.append((self._heartbeat(), ()))
            self._saver.save_due(self._held.values(), now)
        return news + self._outbox.due(now)

    def _heartbeat(self) -> Heartbeat:
        version, branch = self._loaded
        return Heartbeat(
            asked=self._credits.asked,
            loaded_version=version,
            branch=branch,
            progress={lease_id: job.tell() for lease_id, job in self._held.items()},
            evaluations=[number for kind, number in (*self._running, *self._outbox) if kind == "eval"],
            gauges=self.gauges(),
        )

    @property
    def _loaded(self) -> tuple[int, int]:
        return self._engine.loaded_version, self._branch
