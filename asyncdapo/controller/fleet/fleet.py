"""The fleet: the processes that generate, kept alive, and started again after a death.

    replay server   its next life resumes from the ledger, on the same ports: peers reconnect and deliver again
    rollout worker  its leases are lost at once; the next life joins with the model's own weights. Workers also come and
                    go while the fleet lives: `elastic`

This is all that an evaluation needs. A run has a learner beside it, from which workers catch up: `training_fleet`.

In: where to begin (`Start`). Out: processes to call. What a process raises on purpose (UserError, RunError) ends the
run. Only a worker, of which there may be others, is restarted whatever RunError but VerdictError ended it, or its next
start (a GPU's memory may not be free yet). Does not own: who notices a death and brings a process up (`supervisor`),
what the processes are told to do (`run`, `eval.alone`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

import psutil

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.auto import check_host, dtype_lines, settle_placement, shards_line
from asyncdapo.controller.fleet.elastic import ElasticWorker, ElasticWorkers
from asyncdapo.controller.fleet.placement import Bundle, Placement, learner_names
from asyncdapo.controller.fleet.process import Process, ProcessDied, Watch
from asyncdapo.controller.fleet.rooms import Room, gpus_of_nodes, reserve
from asyncdapo.controller.fleet.supervisor import Supervisor
from asyncdapo.controller.process.health import Filling
from asyncdapo.controller.roles.actors import LearnerActor, ReplayActor, RolloutActor, start_replay, start_rollout
from asyncdapo.controller.roles.base import ProcessBase, ProcessSpec
from asyncdapo.controller.roles.opening import Opened, Start
from asyncdapo.errors import RunError
from asyncdapo.transport.keys import RunKeys

if TYPE_CHECKING:
    from asyncdapo.controller.roles.learner import LearnerProcess
    from asyncdapo.controller.roles.replay import ReplayProcess
    from asyncdapo.controller.roles.rollout import RolloutProcess

LOOK_S = 2.0
"""Between two looks at all processes."""
NEWCOMERS = Bundle(())
"""In place of the bundle of a worker that joins later on a CPU."""
TURN_S = 30.0
"""A start takes some seconds; that of a process which is stopped, as long as that lasts."""
JOIN_S = 30.0
"""Time for a worker that was just started to be heard."""

log = logging.getLogger("controller")


def settle(config: Config, gpus: Sequence[int], ranks: Sequence[str]) -> tuple[Config, Placement]:
    """Decide who lives where, and computes in what. `gpus`: of each node; `ranks`: of the learner. Returns the config
    with what follows from who has a GPU."""
    settled, placement = settle_placement(config, gpus, ranks)
    if not config.controller.ray_address:
        check_host(settled, placement, psutil.virtual_memory().total)
    said, *costs = dtype_lines(config, placement)
    if placement.num_gpus:
        log.info("placement: %s", placement.reason)
        log.info("%s", said)
    if len(ranks) > 1:
        log.info("%s", shards_line(settled, placement))
    for cost in costs:
        log.warning("%s", cost)
    return settled, placement


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Every process that a run starts with has room to live in; none is started."""

    config: Config
    """As `settle` returns it."""
    placement: Placement
    rooms: dict[str, Room]
    """By process."""
    replay: Process[ReplayProcess]
    ranks: Sequence[Process[LearnerProcess]]
    workers: Sequence[Process[RolloutProcess]]
    """All that there may be."""

    @classmethod
    async def reserved(cls, config: Config, *, with_learner: bool) -> Placed:
        """Ask Ray for the room. Raises RunError after `controller.place_timeout_s`."""
        config, placement = settle(config, gpus_of_nodes(), learner_names(config) if with_learner else ())
        rooms = await reserve(placement, config.controller.place_timeout_s)
        placed = partial(Process.placed, rooms=rooms)
        spec = partial(ProcessSpec, config=config, keys=RunKeys.make())
        return cls(
            config=config,
            placement=placement,
            rooms=rooms,
            replay=placed(ReplayActor, spec(role="replay"), threads=1),
            ranks=[
                placed(LearnerActor, spec(role="learner", index=rank), threads=config.learner.threads)
                for rank in range(config.learner.ranks if with_learner else 0)
            ],
            workers=[
                placed(RolloutActor, spec(role="rollout", index=index), threads=config.rollout.threads)
                for index in range(config.rollout.max_workers)
            ],
        )

    async def has_room(self, process: Process[ProcessBase]) -> None:
        """Wait for room on another node if its own is gone. Raises RunError after `controller.place_timeout_s`."""
        await self.rooms[process.name].found(process.name, self.config.controller.place_timeout_s)

    @property
    def first_workers(self) -> Sequence[Process[RolloutProcess]]:
        """Those that a run starts with."""
        return self.workers[: self.config.rollout.min_workers]

    @property
    def processes(self) -> Sequence[Process[ProcessBase]]:
        """Those that a run starts with."""
        return [self.replay, *self.ranks, *self.first_workers]


class Fleet:
    """A replay server that is up, and its rollout workers. `start` returns it when those that it starts with are."""

    def __init__(self, supervisor: Supervisor, placed: Placed, opened: Opened) -> None:
        """`opened`: by the replay server."""
        self._supervisor, self.opened = supervisor, opened
        self.config, self.placement = placed.config, placed.placement
        self.replay, self.workers, self.first_workers = placed.replay, placed.workers, placed.first_workers
        self.placed = placed
        self.totals: dict[str, float] = {}
        """The latest metrics line, from which counts of a replay server that is started again continue."""
        self.leasing = False
        """Whether a replay server that is started again grants leases at once."""
        self._watched = False
        """Whether the start is over."""
        self._turns: defaultdict[Bundle, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._elastic = ElasticWorkers(
            placed.config,
            supervisor,
            [
                ElasticWorker(
                    index,
                    worker,
                    placed.replay,
                    supervisor,
                    self,
                    drain_s=placed.config.rollout.drain_s,
                    placement=placed.placement,
                    rooms=placed.rooms,
                )
                for index, worker in enumerate(placed.workers)
            ],
        )

    @classmethod
    async def start(cls, config: Config, supervisor: Supervisor, start: Start) -> Self:
        """Place and start everything."""
        fleet = await cls._with_replay_up(config, supervisor, start, with_learner=False)
        await asyncio.gather(*map(fleet.bring_up_worker, fleet.first_workers))
        return fleet

    @classmethod
    async def _with_replay_up(cls, config: Config, supervisor: Supervisor, start: Start, *, with_learner: bool) -> Self:
        """All of it is placed; the replay server is up, the others have begun to load their libraries."""
        placed = await Placed.reserved(config, with_learner=with_learner)
        for process in placed.processes:
            supervisor.include(process)
            process.prepare()
        return cls(supervisor, placed, await _bring_up_replay(supervisor, placed, start, leasing=False))

    def watch(self, watch: Watch, on_filling: Callable[[Filling], None] = lambda _: None) -> None:
        """Keep the replay server and the workers alive from now on. `on_filling` is told at every look how far the next
        batch is."""
        watch.add("the look at all processes", self._look(on_filling))
        watch.add("replay", self._supervisor.keep(self.replay, self._serve_replay, self._revive_replay))
        self._watched = True
        self._elastic.watch(watch)

    async def bring_up_worker(self, worker: Process[RolloutProcess]) -> None:
        """After the others of its bundle: vLLM measures what is free on a GPU while it starts, and would count as its
        own what others allocate meanwhile. On CPUs those that join later start one after the other, since each start
        takes cores from the run; but none waits for longer than `TURN_S` for one."""
        memory_fraction = self.placement.memory_fraction(worker.name, self.config.rollout.memory_fraction)
        outlives = RunError if worker.life or self._watched else ProcessDied
        bundle = self.placement.bundle(worker.name)
        turn = self._turns[bundle if bundle.num_gpus or not self._watched else NEWCOMERS]

        async def begin_life() -> None:
            async with turn if bundle.num_gpus else held(turn, TURN_S):
                await self._supervisor.start(worker, start_rollout, self.opened.rollout_address, memory_fraction)

        await self._supervisor.bring_up(worker, begin_life, outlives)

    async def serve_worker(self, worker: Process[RolloutProcess], *, late: bool) -> None:
        """As long as its life lasts. `late`: it lacks the weights in force."""
        serving = asyncio.ensure_future(worker.call(lambda worker: worker.serve))
        keeping = asyncio.ensure_future(self.keep_current(worker, late=late))
        try:
            await asyncio.wait({serving, keeping}, return_when=asyncio.FIRST_COMPLETED)
            if keeping.done():
                keeping.result()
            await serving
        finally:
            serving.cancel()
            keeping.cancel()
            await asyncio.gather(serving, keeping, return_exceptions=True)

    async def end_worker(self, worker: Process[RolloutProcess]) -> None:
        """End the process of a worker that was drained."""
        worker.end()

    async def keep_current(self, worker: Process[RolloutProcess], *, late: bool) -> None:
        """Give a worker that lacks the weights in force what it lacks: here the model's own, which it has loaded."""

    async def _serve_replay(self) -> None:
        await self.replay.call(lambda replay: replay.serve)

    async def _revive_replay(self, death: RunError) -> None:
        await self._supervisor.pause(self.replay, death)
        again, before = Start(ports=self.opened.ports, totals=self.totals), self.opened
        self.opened = await _bring_up_replay(self._supervisor, self.placed, again, leasing=self.leasing)
        if self.opened.rollout_address != before.rollout_address:
            log.warning("replay has moved to another node: all that talk to it are started again")
            self.end_peers()

    def end_peers(self) -> None:
        """Kill what knows a former address of the replay server, whether it is up or being started."""
        for worker in self.workers:
            worker.end()

    async def _look(self, on_filling: Callable[[Filling], None]) -> None:
        """Look at all processes, kill workers that the replay server has lost though their process lives, and see which
        should come and go."""
        while True:
            await asyncio.sleep(LOOK_S)
            health = await self._supervisor.look()
            replay = health[self.replay.name]
            if replay and replay.filling:
                on_filling(replay.filling)
            for worker in [self.workers[index] for index in (replay.lost if replay else ())]:
                if worker.up.is_set() and time.monotonic() - worker.since > JOIN_S:
                    log.warning("%s has fallen silent: it is killed", worker.name)
                    worker.end()
            await self._elastic.look(health)


@asynccontextmanager
async def held(turn: asyncio.Lock, most_s: float) -> AsyncIterator[None]:
    """The turn is held for this block, and not for longer than `most_s`."""
    await turn.acquire()
    release = asyncio.get_running_loop().call_later(most_s, turn.release)
    try:
        yield
    finally:
        if asyncio.get_running_loop().time() < release.when():
            release.cancel()
            turn.release()


async def _bring_up_replay(supervisor: Supervisor, placed: Placed, start: Start, *, leasing: bool) -> Opened:
    """Until it is up, and grants leases if `leasing`. Returns what the others need to know of it."""
    replay = placed.replay

    async def begin_life() -> Opened:
        await placed.has_room(replay)
        await supervisor.start(replay, start_replay, start)
        if leasing:
            await replay.call(lambda replay: replay.begin)
        return await replay.call(lambda replay: replay.opened)

    return await supervisor.bring_up(replay, begin_life)
