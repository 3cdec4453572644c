"""The replay server: joins rollout workers and the learner to the pure core and the journal.

    workers ──Hello, Ask, Started, Loaded, GroupDone, EvalDone, Heartbeat…─▶ ROUTER ─▶ workers ─┐
            ◀──Welcome, Lease, Ack, Reject, Withdraw, Recall, EvalRequest──                     ├─▶ dispatch: event ─▶
    learner ──CutWanted──▶ ROUTER ──────────────────────────────────────────────────────────────┤   core ─▶ journal ─▶
            ◀──Batch, NoBatch──                                                                 │   messages
    controller ──begin, trained, published, evaluate, roll_back, finish (Ray calls)─────────────┘

One event loop, and one event at a time. Nothing pauses between messages and their transaction. What follows of it waits
for the disk, and the loop goes on meanwhile.

A server that is killed and started again on the same files and ports resumes where the ledger ends, and its peers
reconnect by themselves. Every command may come twice, so that the controller can repeat a call during which the server
died. The second call gets the answer of the first.

waits for: messages, commands, its own clock   unblocked by: workers, learner, controller
Owns: the sockets and the clock. Does not own: what messages mean (`workers`), what is sent and when (`dispatch`), what
is leased, kept and cut (`state`), rows and payloads (`journal`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asyncdapo import faults
from asyncdapo.accounting.clock import SharedClock
from asyncdapo.accounting.spans import Span
from asyncdapo.errors import RunError
from asyncdapo.eval_messages import EvalAnswer, EvalRequest
from asyncdapo.messages import Prompt
from asyncdapo.replay.core.stream import AnswerLengths
from asyncdapo.replay.core.waits import gauges, why_waiting
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.server.accounts import in_flight
from asyncdapo.replay.server.arrivals import Arrivals
from asyncdapo.replay.server.dispatch import Dispatch, MakeState
from asyncdapo.replay.server.sessions import Session, Sessions
from asyncdapo.replay.server.settings import ServerSettings
from asyncdapo.replay.server.workers import FromWorker, Workers
from asyncdapo.shares import CutWanted
from asyncdapo.transport.codec import BATCH_LIMITS
from asyncdapo.transport.keys import ServerKeys
from asyncdapo.transport.sockets import Server

STATES = ("workers", "learner", "commands", "clock")
"""On whose behalf the server works; `idle` is the rest of its time."""
MAX_TOGETHER = 16
"""Most messages of workers in one transaction."""

log = logging.getLogger("replay")


class ReplayServer:
    """Serves rollout workers, the learner and the controller. Create and call it in one running event loop."""

    def __init__(
        self,
        settings: ServerSettings,
        make_state: MakeState,
        journal: Journal,
        prompt_at: Callable[[int], Prompt | None],
        *,
        lengths: AnswerLengths | None = None,
        host: str = "127.0.0.1",
        ports: tuple[int, int] = (0, 0),
        curve: ServerKeys | None = None,
    ) -> None:
        """`make_state` makes the core from what the journal recovers, now and after a rollback. `prompt_at`: the prompt
        stream by position. `lengths`: is told of every group. `ports`: for workers and for the learner, 0 is any. A
        server that is started again gets the ports of its former life."""
        self._journal, self._heartbeat_s = journal, settings.replay.heartbeat_s
        self._num_ranks = settings.dealer.num_ranks
        self._sessions = Sessions(settings.stall_ticks, settings.totals)
        self._dispatch = Dispatch(settings, make_state, journal, self._sessions, prompt_at)
        self._sessions.count_tokens_from(self._dispatch.accounts.num_tokens)
        self._arrivals = Arrivals(settings, self._dispatch, self._sessions, journal, lengths)
        self._workers = Workers(settings, self._dispatch, self._sessions, self._arrivals)
        self._clock = SharedClock(STATES, rest="idle")
        self._clock.begin()
        self._totals = settings.totals
        rollout_port, learner_port = ports
        self._rollout_socket = Server(FromWorker, host, port=rollout_port, curve=curve)
        self._learner_socket = Server(CutWanted, host, BATCH_LIMITS, port=learner_port, curve=curve)
        self.rollout_address, self.learner_address = self._rollout_socket.address, self._learner_socket.address

    @property
    def branch(self) -> int:
        """The run's branch. Every rollback raises it."""
        return self._dispatch.branch

    @property
    def ports(self) -> tuple[int, int]:
        """The port for workers and the port for the learner."""
        rollout, learner = (int(address.rpartition(":")[2]) for address in (self.rollout_address, self.learner_address))
        return rollout, learner

    async def run(self) -> None:
        """Serve until cancelled, then close the sockets. The end of the data doesn't end it. Raises RunError if the run
        can't continue, ConfigError if groups lack the metric of the filter."""
        loops = (self._serve_workers(), self._serve_learner(), self._send(), self._answer_learner())
        loops += (self._tick(), self._fail())
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._rollout_socket.close()
            self._learner_socket.close()

    # ---------------------------------------------------------------------------------------------------- commands

    async def begin(self) -> None:
        """Grant leases from now on. Before that only evaluation runs."""
        self._workers.leasing = True
        with self._dispatch.together():
            self._workers.offer_all()

    async def pause(self) -> None:
        """Grant no leases until `begin`. Running leases continue."""
        self._workers.pause()

    async def recall(self) -> None:
        """Grant no leases, and have the workers hand back theirs with what is sampled. Evaluations continue."""
        await self._workers.recall()

    async def roll_back(self, step: int, reason: str) -> int:
        """Go back to the checkpoint of `step`, and return the new branch. What came after the checkpoint is undone, and
        every lease is over. A worker gets work again once it has weights of the new branch."""
        await self._workers.roll_back(step, reason)
        return self.branch

    async def lose_worker(self, worker: int, cause: str) -> None:
        """The worker's process is gone. Call it before the next one is started."""
        with self._dispatch.together():
            self._workers.lose(worker, cause)

    async def drain_worker(self, worker: int, within_s: float, cause: str) -> int:
        """The worker is to leave: it finishes what it holds, at most for `within_s`, and others get the rest. Returns
        how many leases it hands back. Call it before its process is ended, and `lose_worker` after that."""
        return await self._workers.drain(worker, within_s, cause)

    async def trained(self, step: int, summary: Mapping[str, float]) -> dict[str, float]:
        """Batch `step` was trained on; `summary` is the learner's report. Returns the metrics of the step that
        docs/metrics.md lists: reward/…, filter/…, rollout/…, replay/…"""
        with self._clock.on("commands"):
            replay, workers = self._dispatch.trained(step, summary), self._sessions.totals()
            settled = self._journal.settled(step)
        await self._journal.durable()
        await asyncio.to_thread(self._journal.let_go, settled)
        replay["replay/tokens_partial"] = self._dispatch.state.leases.num_partial_tokens
        return {
            **replay,
            **workers,
            "replay/tokens_in_flight": in_flight({**replay, **workers}),
            **self._times(),
            **{f"replay/{name}": number for name, number in gauges(self._dispatch.state).items()},
            **{f"replay/{what}": number for what, number in self._arrivals.dropped.items()},
        }

    async def published(self, version: int) -> None:
        """The send of `version` is over."""
        with self._clock.on("commands"):
            self._dispatch.published(version)

    async def covered(self, step: int) -> None:
        """A checkpoint of `step` exists. Payloads that nothing can need any more are freed."""
        with self._clock.on("commands"):
            segments = self._journal.covered(step)
        await asyncio.to_thread(self._journal.free, segments)

    async def evaluate(self, requests: Sequence[EvalRequest]) -> list[EvalAnswer]:
        """All answers, in the order of requests and prompts. The requests of a lost worker go to others. A repeated
        call joins the first. Raises ValueError for a request id that another evaluation uses."""
        return await self._workers.evaluate(requests)

    async def finish(self) -> None:
        """No further step: leases are withdrawn, prompts without an end become `unused`, open evaluations are given up.
        New ones may follow."""
        self._workers.leasing = False
        self._workers.give_up_evaluations()
        self._dispatch.finish()
        await self._journal.durable()
        self._journal.fold()

    def status(self) -> dict[str, Any]:
        """For progress lines and the report of waits: who waits for whom, which workers exist, and current counts."""
        evaluations, state = self._workers.evaluations, self._dispatch.state
        return {
            "why_waiting": self._why_waiting(),
            "branch": self.branch,
            "filling_step": state.next_batch.step,
            "ready": state.next_batch.num_ready,
            "failed": self._dispatch.failures.num_failed,
            "last_failure": self._dispatch.failures.last_words,
            "first_lease_at_s": self._dispatch.first_lease_at_s,
            "known_workers": {session.worker: self._describe(session) for session in self._sessions.known},
            "suspected_workers": self._sessions.suspected,
            "lost_workers": self._sessions.lost,
            "evaluations_waiting": evaluations.num_waiting,
            "evaluations_running": evaluations.num_under_way,
            "sampled_tokens": self._sessions.total("tokens"),
            "dropped": dict(self._arrivals.dropped),
            **gauges(state),
        }

    def take_spans(self) -> list[Span]:
        """What it did when since the `take_spans` before."""
        return self._clock.take_spans()

    def _times(self) -> dict[str, float]:
        """Of this server and of those before it, as of the line from which it counts."""
        times = {f"replay/time/{state}_s": seconds for state, seconds in self._clock.totals().items()}
        times["replay/cpu_s"] = time.process_time()
        return {name: self._totals.get(name, 0.0) + seconds for name, seconds in times.items()}

    def _describe(self, session: Session) -> dict[str, float]:
        """What a worker said last. `stalled`: leases in a row that stalled there, so its engine may hang."""
        return {
            "joined": session.alive,
            "loaded_version": session.loaded_version,
            "branch": session.branch,
            "leases": len(self._sessions.held_by(session.worker)),
            "silent_s": (self._sessions.tick - session.heard_tick) * self._heartbeat_s,
            "tokens": session.gauges.get("tokens", 0.0),
            "tokens_per_s": session.pace.tokens_per_s,
            "running": session.pace.running,
            "waiting": session.pace.waiting,
            "stalled": session.num_stalled,
        }

    def _why_waiting(self) -> str:
        state, evaluations = self._dispatch.state, self._workers.evaluations
        why, num_open = why_waiting(state), evaluations.num_waiting + evaluations.num_under_way
        if num_open and (state.over or not (state.next_batch.wanted or state.cut_batches.in_training)):
            why = "rollout: no batch is wanted"  # only an evaluation runs, and its answers are waited for
        elif why.startswith("rollout") and (
            unkept := self._dispatch.accounts.describe_unkept(2 * state.config.prompts_per_step)
        ):
            why += f"; {unkept}"
        if behind := [session.worker for session in self._sessions.known if session.branch != self.branch]:
            why += f"; workers {behind} have no weights of branch {self.branch} yet"
        if suspected := self._sessions.suspected:
            why += f"; nothing heard for long from workers {suspected}"
        if num_open:
            why += f"; {num_open} evaluation requests are open"
        return why

    # ------------------------------------------------------------------------------------------------------- loops

    async def _serve_workers(self) -> None:
        """All messages that have arrived form one transaction. No other task runs before its end."""
        while True:
            messages = await self._rollout_socket.receive_some(MAX_TOGETHER)
            with self._clock.on("workers"), self._dispatch.together():
                for message in messages:
                    self._workers.hear(*message)

    async def _serve_learner(self) -> None:
        while True:
            peer, message, _ = await self._learner_socket.receive()
            if isinstance(message, CutWanted) and self._can_be(message):
                with self._clock.on("learner"):
                    self._dispatch.want_batch(peer, message)
            else:
                self._arrivals.dropped["malformed"] += 1
                log.warning("on the learner's socket: %s", message)

    def _can_be(self, wanted: CutWanted) -> bool:
        """Whether a rank of a learner can have asked this. Otherwise the message is damaged."""
        return wanted.step <= self._dispatch.state.next_batch.step and 0 <= wanted.rank < self._num_ranks

    async def _send(self) -> None:
        """What the messages tell is on disk before they leave. Meanwhile others are handled, and leave together."""
        outgoing = self._dispatch.outgoing
        while True:
            letters = [await outgoing.get()]
            letters += [outgoing.get_nowait() for _ in range(outgoing.qsize())]
            await self._journal.durable()
            for letter in letters:
                await self._rollout_socket.send(letter.peer, letter.message, letter.frames)
                faults.point("after_send")

    async def _answer_learner(self) -> None:
        while True:
            answer = await self._dispatch.answers.get()
            await self._journal.durable()
            await self._learner_socket.send(answer.peer, await asyncio.to_thread(answer.make))
            faults.point("after_send")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            with self._clock.on("clock"), self._dispatch.together():
                self._workers.tick()

    async def _fail(self) -> None:
        raise RunError(await self._dispatch.failure.get())
