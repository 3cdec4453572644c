"""Elastic workers: how many rollout workers there should be, and each one's way from room on Ray to its leave.

    wanted ──room on Ray──▶ is started ──weights──▶ lives ──is asked to leave──▶ drained ──▶ gone
       ▲                         ▲                    │ dies                                  │
       │                         └────────────────────┘                                       │
       └──────────────── still wanted: its node goes away, somebody sent it SIGTERM ◀─────────┘

As many workers are wanted as `asyncdapo scale` asks for, at first the most: those that answer, then those with the
lowest numbers. A run starts with the least and waits for no other: whoever is wanted beyond them joins once Ray has
room.

In: that number, SIGTERMs, nodes that Ray drains, deaths. Out: workers that live. Invariants: one that is asked to leave
is drained before its process ends, and no transfer of weights breaks under it; a run without any worker says whom it
waits for, and ends after `rollout.empty_s`. Past its budget of deaths a worker of a range stays away, unless it is the
last; of a fixed number it ends the run. Does not own: what a worker is told at its start (`fleet`), who lives where
(`placement`, `rooms`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.placement import Placement
from asyncdapo.controller.fleet.process import Process, Watch
from asyncdapo.controller.fleet.rooms import LOOK_S, Room, draining_nodes
from asyncdapo.controller.fleet.supervisor import Supervisor
from asyncdapo.controller.process import wanted_workers
from asyncdapo.controller.process.health import Health
from asyncdapo.controller.process.restarts import TooManyDeaths
from asyncdapo.errors import RunError, VerdictError

if TYPE_CHECKING:
    from asyncdapo.controller.roles.replay import ReplayProcess
    from asyncdapo.controller.roles.rollout import RolloutProcess

log = logging.getLogger("controller")


class Host(Protocol):
    """What the fleet does for its workers."""

    async def bring_up_worker(self, worker: Process[RolloutProcess]) -> None:
        """Start it, as often as that takes."""
        ...

    async def serve_worker(self, worker: Process[RolloutProcess], *, late: bool) -> None:
        """As long as its life lasts. `late`: it lacks the weights in force."""
        ...

    async def end_worker(self, worker: Process[RolloutProcess]) -> None:
        """End its process, when no transfer of weights counts on it."""
        ...


class ElasticWorker:
    """A worker that a run may have, in all its lives."""

    def __init__(
        self,
        index: int,
        process: Process[RolloutProcess],
        replay: Process[ReplayProcess],
        supervisor: Supervisor,
        host: Host,
        *,
        drain_s: float,
        placement: Placement,
        rooms: dict[str, Room],
    ) -> None:
        """`rooms`: of all processes, by name. If it has one there, it is being started, or is up."""
        self.process, self._index, self._replay, self._supervisor, self._host = process, index, replay, supervisor, host
        self._drain_s, self._placement, self._rooms = drain_s, placement, rooms
        self.wanted = asyncio.Event()
        self.node = ""
        """Where its room is, if it may have another one."""
        self._leave = asyncio.Event()
        self._cause = ""

    def want(self) -> None:
        """It should live from now on."""
        self.wanted.set()

    def let_go(self, cause: str) -> None:
        """It should not live any more."""
        if self.wanted.is_set():
            self.wanted.clear()
            self.ask_to_leave(cause)

    def ask_to_leave(self, cause: str) -> None:
        """This life should end; the next one begins elsewhere if it is still wanted."""
        if not self._leave.is_set():
            self._cause = cause
            self._leave.set()

    async def keep(self) -> None:
        """Have it live whenever it is wanted and there is room. Raises what ends the run."""
        while True:
            await self._find_room()
            try:
                await self._live()
            except VerdictError:
                raise
            except RunError as death:
                await self._replay.ask(lambda replay: replay.lose_worker, self._index, str(death))
                await self._supervisor.pause(self.process, death)
            else:
                self._give_room_back()

    async def stay_away(self) -> None:
        """It has died too often: give its room back, for good."""
        self.wanted.clear()
        self._supervisor.forget(self.process)
        await self._supervisor.clear(self.process)
        self._give_room_back()
        await asyncio.Event().wait()

    async def _find_room(self) -> None:
        """Until it is wanted and has a room that is there."""
        name, supervisor = self.process.name, self._supervisor
        while True:
            if not self.wanted.is_set():
                supervisor.forget(self.process)
                self._give_room_back()
                await self.wanted.wait()
            if name not in self._rooms:
                self._rooms[name] = Room.asked_for(self._placement.bundle(name))
            room = self._rooms[name]
            node = await asyncio.to_thread(room.node)
            if node and self.wanted.is_set():
                self.node = node if room.bundle.is_lone_worker else ""
                return supervisor.include(self.process)
            if not node:
                supervisor.miss(self.process, f"waits for room on Ray ({room})")
                await asyncio.sleep(LOOK_S)

    def _give_room_back(self) -> None:
        room = self._rooms.get(self.process.name)
        if room and room.bundle.is_lone_worker:
            del self._rooms[self.process.name]
            room.give_back()

    async def _live(self) -> None:
        """One life, up to its leave. Raises what else ends it."""
        late = not self.process.up.is_set()
        self._leave.clear()
        if late and not await self._unless_asked_to_leave(self._host.bring_up_worker(self.process)):
            self.process.end()
            await self._supervisor.clear(self.process)
            log.info("%s has left (%s) before it was up", self.process.name, self._cause)
            return
        if late:
            log.info("%s has joined", self.process.name)
        serving = asyncio.ensure_future(self._host.serve_worker(self.process, late=late))
        try:
            if await self._unless_asked_to_leave(asyncio.shield(serving)):
                raise RunError(f"{self.process.name} ended before the run did")
            await self._drain(serving)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    async def _unless_asked_to_leave(self, work: Coroutine[Any, Any, None] | asyncio.Future[None]) -> bool:
        """Whether the work was done; else it is cancelled."""
        task, leave = asyncio.ensure_future(work), asyncio.ensure_future(self._leave.wait())
        try:
            await asyncio.wait({task, leave}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            return task.done()
        finally:
            task.cancel()
            leave.cancel()
            await asyncio.gather(task, leave, return_exceptions=True)

    async def _drain(self, serving: asyncio.Future[None]) -> None:
        """It finishes what it holds, or hands it back; then its process ends. Raises what ends it before."""
        name, index, cause = self.process.name, self._index, self._cause
        log.info("%s is to leave (%s): it has %g s for what it holds", name, cause, self._drain_s)
        asked = self._replay.ask(lambda replay: replay.drain_worker, index, self._drain_s, cause)
        drained = asyncio.ensure_future(asked)
        try:
            await asyncio.wait({drained, serving}, return_when=asyncio.FIRST_COMPLETED)
            if not drained.done():
                serving.result()
            num_handed_back = drained.result()
        finally:
            drained.cancel()
        await self._host.end_worker(self.process)
        await self._replay.ask(lambda replay: replay.lose_worker, index, cause)
        await self._supervisor.clear(self.process)
        log.info("%s has left (%s), %d leases go to others", name, cause, num_handed_back)


class ElasticWorkers:
    """All workers that a run may have."""

    def __init__(self, config: Config, supervisor: Supervisor, workers: Sequence[ElasticWorker]) -> None:
        self._rollout, self._run_dir = config.rollout, Path(config.run.dir)
        self._on_cluster = config.controller.ray_address is not None
        self._supervisor, self._workers = supervisor, workers
        self.num_wanted = 0
        self._empty_since: float | None = None
        self._read_scale()

    def watch(self, watch: Watch) -> None:
        """Keep them from now on."""
        for worker in self._workers:
            watch.add(worker.process.name, self._keep(worker))

    async def look(self, reports: Mapping[str, Health | None]) -> None:
        """See who should join or leave. Raises RunError after `rollout.empty_s` without a worker."""
        self._read_scale()
        draining = await asyncio.to_thread(draining_nodes) if self._on_cluster else frozenset()
        for worker in self._workers:
            report = reports.get(worker.process.name)
            if report and report.leaving:
                worker.ask_to_leave(report.leaving)
            elif worker.node in draining:
                worker.ask_to_leave("Ray drains its node")
        self._check_empty()

    async def _keep(self, worker: ElasticWorker) -> None:
        try:
            await worker.keep()
        except TooManyDeaths as death:
            others = (other.process.up.is_set() for other in self._workers if other is not worker)
            if self._rollout.min_workers == self._rollout.max_workers or not any(others):
                raise
            log.warning("%s; it stays away, the others go on", death)
            await worker.stay_away()

    def _read_scale(self) -> None:
        least, most = self._rollout.min_workers, self._rollout.max_workers
        asked = wanted_workers.asked_for(self._run_dir)
        wanted = most if asked is None else min(max(asked, least), most)
        if wanted == self.num_wanted:
            return
        if asked is not None and least < most:
            log.info("%d rollout workers are asked for, of %d to %d", wanted, least, most)
        self.num_wanted = wanted
        by_use = sorted(self._workers, key=lambda worker: not self._supervisor.hears_from(worker.process))
        for worker in by_use[:wanted]:
            worker.want()
        for worker in by_use[wanted:]:
            worker.let_go(f"scaled to {wanted}")

    def _check_empty(self) -> None:
        """A worker that is being started counts: its start has a deadline of its own."""
        if any(worker.process in self._supervisor.processes for worker in self._workers):
            self._empty_since = None
            return
        self._supervisor.note_progress()  # this wait has a deadline of its own, too
        waits = "; ".join(f"{name} {what}" for name, what in self._supervisor.missing.items())
        empty_s = self._rollout.empty_s
        if self._empty_since is None:
            self._empty_since = time.monotonic()
            log.warning("no rollout worker is left, the run ends in %g s (rollout.empty_s): %s", empty_s, waits)
        elif time.monotonic() - self._empty_since > empty_s:
            raise RunError(f"no rollout worker has lived for rollout.empty_s ({empty_s:g} s): {waits}")
