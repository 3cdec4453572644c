"""The replay server: joins rollout workers and the learner to the pure core and the journal.

    workers ──Hello, Ask, Started, Loaded, GroupDone, EvalDone, Heartbeat──▶ ROUTER ─▶ workers ─┐
            ◀──Welcome, Lease, Ack, Reject, Withdraw, EvalRequest──                             ├─▶ exchange: event ─▶
    learner ──CutWanted──▶ ROUTER ──────────────────────────────────────────────────────────────┤   core ─▶ journal ─▶
            ◀──Batch, NoBatch──                                                                 │   messages
    controller ──begin, trained, published, evaluate, finish (Ray calls)────────────────────────┘

One event loop and one event at a time; nothing between a message and its transaction waits.

waits for: messages, commands, its own clock   unblocked by: workers, learner, controller
Owns: the sockets and the clock. Does not own: what messages mean (`workers`), what is sent when (`exchange`), what is
leased, kept and cut (`state`), rows and payloads (`journal`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from asyncdapo.errors import RunError
from asyncdapo.messages import CutWanted, EvalAnswer, EvalRequest, Prompt
from asyncdapo.replay import events as core
from asyncdapo.replay.config import ReplayConfig
from asyncdapo.replay.exchange import Exchange
from asyncdapo.replay.journal import Journal
from asyncdapo.replay.sessions import Sessions
from asyncdapo.replay.state import ReplayState
from asyncdapo.replay.workers import FromWorker, Workers
from asyncdapo.transport.sockets import Server

log = logging.getLogger("replay")


class ReplayServer:
    """Serves rollout workers, the learner and the controller. Made and called in one running event loop."""

    def __init__(
        self,
        config: ReplayConfig,
        state: ReplayState,
        journal: Journal,
        prompt_at: Callable[[int], Prompt | None],
        *,
        group_size: int,
        seed: int,
        total_slots: int,
        host: str = "127.0.0.1",
    ) -> None:
        """`prompt_at`: the prompt stream by position. `total_slots`: sequences that all workers generate at once, of
        which an evaluation gets its share."""
        self._state, self._journal, self._heartbeat_s = state, journal, config.heartbeat_s
        self._sessions = Sessions(stall_ticks=config.lease_stall_s / config.heartbeat_s)
        self._exchange = Exchange(
            state,
            journal,
            self._sessions,
            prompt_at,
            group_size=group_size,
            seed=seed,
            staleness_bound=config.staleness_bound,
        )
        self._workers = Workers(self._exchange, self._sessions, journal, group_size=group_size, total_slots=total_slots)
        self._rollout_socket, self._learner_socket = Server(FromWorker, host), Server(CutWanted, host)
        self.rollout_address, self.learner_address = self._rollout_socket.address, self._learner_socket.address

    async def run(self) -> None:
        """Serve until cancelled, also when the data is used up; then close the sockets. Raises RunError when the run
        can't go on, ConfigError when groups lack the metric of the filter."""
        loops = (self._serve_workers(), self._serve_learner(), self._send(), self._tick(), self._fail())
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
        """Grant leases from now on; until then only evaluation runs."""
        self._workers.leasing = True
        self._workers.offer_all()

    async def trained(self, step: int, summary: Mapping[str, float]) -> dict[str, float]:
        """Batch `step` is trained on; `summary` is what the learner says of it. Returns the metrics of the step:
        reward/…, filter/…, rollout/…, replay/…, as docs/metrics.md lists them."""
        return {
            **self._exchange.trained(step, summary),
            **{f"rollout/{gauge}": self._sessions.total(gauge) for gauge in ("tokens", "busy_s", "idle_s")},
            **{f"replay/{name}": number for name, number in self._state.gauges().items()},
            **{f"replay/{what}": number for what, number in self._workers.dropped.items()},
        }

    async def published(self, version: int) -> None:
        """The send of `version` is over."""
        self._exchange.apply(core.Published(version=version))

    async def covered(self, step: int) -> None:
        """A checkpoint of `step` exists: payloads that nothing can ask for any more are freed."""
        self._journal.covered(step)
        self._journal.fold()

    async def evaluate(self, requests: Sequence[EvalRequest], share: float) -> list[EvalAnswer]:
        """All answers, in the order of requests and prompts; `share` of all slots is the most that it takes. Requests
        of lost workers are given out again. Raises ValueError for a request id that is in use."""
        return await self._workers.evaluate(requests, share)

    async def finish(self) -> None:
        """No further step: leases are withdrawn, prompts without an end become `unused`. Evaluation goes on."""
        self._workers.leasing = False
        self._exchange.apply(core.RunEnded())
        self._journal.fold()

    def status(self) -> dict[str, object]:
        """For progress lines: who waits for whom, and numbers of the moment."""
        evaluations = self._workers.evaluations
        return {
            "why_waiting": self._why_waiting(),
            "first_lease_at_s": self._exchange.first_lease_at_s,
            "suspected_workers": self._sessions.suspected,
            "evaluations_waiting": evaluations.num_waiting,
            "evaluations_running": evaluations.num_under_way,
            "sampled_tokens": self._sessions.total("tokens"),
            "dropped": dict(self._workers.dropped),
            **self._state.gauges(),
        }

    def _why_waiting(self) -> str:
        why, evaluations = self._state.why_waiting(), self._workers.evaluations
        if suspected := self._sessions.suspected:
            why += f"; nothing heard for long from workers {suspected}"
        if num := evaluations.num_waiting + evaluations.num_under_way:
            why += f"; {num} evaluation requests are open"
        return why

    # ------------------------------------------------------------------------------------------------------- loops

    async def _serve_workers(self) -> None:
        while True:
            self._workers.hear(*await self._rollout_socket.receive())

    async def _serve_learner(self) -> None:
        while True:
            peer, message, _ = await self._learner_socket.receive()
            if isinstance(message, CutWanted) and message.step <= self._state.next_step:
                self._exchange.want_batch(peer, message.step)
            else:
                self._workers.dropped["malformed"] += 1
                log.warning("on the learner's socket: %s", message)

    async def _send(self) -> None:
        while True:
            letter = await self._exchange.outgoing.get()
            socket = self._learner_socket if letter.to_learner else self._rollout_socket
            await socket.send(letter.peer, letter.message, letter.frames)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            self._workers.tick()

    async def _fail(self) -> None:
        raise RunError(await self._exchange.failure.get())
