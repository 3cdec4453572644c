"""The fleet: the processes that generate, started, kept alive, and started again after a death.

    replay server   its next life goes on from the ledger, on the same ports: peers reconnect and deliver again
    rollout worker  its leases are lost at once; the next life joins with the model's own weights

This is all that an evaluation needs. A run has a learner beside it, from which workers catch up: `training_fleet`.

In: where to begin (`Start`). Out: processes to call. Invariant: a process is `up` only when it was started completely;
deaths are counted against a budget (`restarts`), past which the run ends with the cause of the last one. What a process
raises on purpose (UserError, RunError) ends the run; only a worker, of which there may be others, is restarted whatever
RunError but VerdictError ended it, or its next start (a GPU's memory may not be free yet). Does not own: what the
processes are told to do (`run`, `eval.alone`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.dtypes import dtype_lines, settle_dtypes
from asyncdapo.controller.fleet.placement import place
from asyncdapo.controller.fleet.process import P, Params, Process, ProcessDied, R, Watch, gpus_of_nodes, reserve
from asyncdapo.controller.fleet.restarts import Restarts
from asyncdapo.controller.process.health import Filling, Pulse
from asyncdapo.controller.process.roster import Roster, this_process
from asyncdapo.controller.process.roster import end as end_entries
from asyncdapo.controller.process.waits import Stall
from asyncdapo.controller.roles.actors import ReplayActor, RolloutActor, start_replay, start_rollout
from asyncdapo.controller.roles.base import ProcessSpec
from asyncdapo.controller.roles.opening import Opened, Start
from asyncdapo.errors import RunError, UserError, VerdictError
from asyncdapo.transport.keys import RunKeys

if TYPE_CHECKING:
    from asyncdapo.controller.roles.rollout import RolloutProcess

LOOK_S = 2.0
"""Between two looks at all processes."""
ANSWER_S = 5.0
"""A process whose event loop is free answers at once."""
SILENT_ANSWER_S = 1.0
"""What is granted to one that gave no answer the last time, so that a process that hangs doesn't hold up the looks."""

CHILDREN_S = 1.0
"""Time for what a dead process had started to notice it."""
JOIN_S = 30.0
"""Time for a worker that was just started to be heard."""

log = logging.getLogger("controller")


class Fleet:
    """A replay server and its rollout workers."""

    ranks: Sequence[str] = ()
    """Of the learner, which have a place too where there is one."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.restarts = Restarts(config.controller.max_restarts, time.monotonic)
        self.keys = RunKeys.make()
        self.roster = Roster(Path(config.run.dir))
        self.roster.set("controller", [this_process("controller")])
        self.processes: list[Process] = []
        self.still_s = 0.0
        """For how long no counter of progress has moved in any process, and none was being started."""
        self._stall = Stall(time.monotonic())
        self.on_filling: Callable[[Filling], None] = lambda _: None
        """Told at every look how far the next batch is."""
        self._silent: set[str] = set()
        self.totals: dict[str, float] = {}
        """The latest metrics line: counts of a replay server that is started again go on from it."""
        self.leasing = False
        """Whether a replay server that is started again grants leases at once."""

    async def start(self, start: Start) -> None:
        """Place and start everything."""
        await self.make()
        self.opened = await self._bring_up_replay(start)
        await asyncio.gather(*map(self._bring_up_worker, self.workers))

    async def make(self) -> Callable[..., Process]:
        """Every process, with room to live in; none is started yet. Returns what makes others that have a place."""
        self.place(gpus_of_nodes())
        config = self.config
        room = await reserve(self.placement, config.controller.place_timeout_s)
        placed = partial(Process.placed, room=room, placement=self.placement)
        self.replay = placed(ReplayActor, self.spec("replay"), threads=1)
        self.workers = [
            placed(RolloutActor, self.spec("rollout", index), threads=config.rollout.threads)
            for index in range(config.rollout.num_workers)
        ]
        self.processes = [self.replay, *self.workers]
        return placed

    def spec(self, role: str, index: int = 0) -> ProcessSpec:
        """Of a process of this run."""
        return ProcessSpec(role=role, index=index, config=self.config, keys=self.keys)

    def place(self, gpus: Sequence[int]) -> None:
        """Decide who lives where and computes in what, from now on. `gpus`: of each node."""
        self.placement = place(self.config, gpus, self.ranks)
        said, *costs = dtype_lines(self.config, self.placement)
        self.config = settle_dtypes(self.config, self.placement)
        if self.placement.num_gpus:
            log.info("placement: %s", self.placement.reason)
            log.info("%s", said)
        for cost in costs:
            log.warning("%s", cost)
        self._turns = [asyncio.Lock() for _ in self.placement.bundles]

    def watch(self, watch: Watch) -> None:
        """Keep the replay server and the workers alive from now on."""
        watch.add("the look at all processes", self._look())
        watch.add("replay", self._keep_replay())
        for index, worker in enumerate(self.workers):
            watch.add(worker.name, self._keep_worker(index, worker))

    def note_progress(self) -> None:
        """Something has happened that no counter shows."""
        self._stall.reset(time.monotonic())
        self.still_s = 0.0

    async def pulses(self) -> Mapping[str, Pulse | None]:
        """Of every process; None where there is no answer."""
        answers = await asyncio.gather(*map(self._pulse, self.processes))
        return dict(zip((process.name for process in self.processes), answers, strict=True))

    def log_path(self, process: Process) -> Path:
        """The process's own log."""
        return Path(self.config.run.dir) / "logs" / f"{process.name}.log"

    async def catch_up(self, worker: Process) -> None:
        """Give a worker that was started again the weights in force: here the model's own, which it has loaded."""

    # ---------------------------------------------------------------------------------------------------------- lives

    async def _keep_replay(self) -> None:
        while True:
            try:
                await self.replay.call(lambda replay: replay.serve)
                raise RunError("replay ended before the run did")
            except ProcessDied as death:
                await self._pause(self.replay, death)
            again = Start(ports=self.opened.ports, totals=self.totals)
            self.opened = await self._bring_up_replay(again)

    async def _keep_worker(self, index: int, worker: Process) -> None:
        while True:
            try:
                serving = asyncio.ensure_future(worker.call(lambda worker: worker.serve))
                if worker.life > 1:
                    await self.catch_up(worker)
                await serving
                death: Exception = RunError(f"{worker.name} ended before the run did")
            except (UserError, VerdictError):
                raise
            except RunError as error:
                death = error
            finally:
                serving.cancel()
            await self.replay.ask(lambda replay: replay.lose_worker, index)
            await self._pause(worker, death)
            await self._bring_up_worker(worker)

    async def _pause(self, process: Process, death: Exception) -> None:
        """Count the death, say it, wait a little longer after each. Raises RunError past the budget."""
        process.end()
        delay_s = self.restarts.delay_s(process.name, death)
        log.warning("%s; it is started again", death)
        await self._clear(process)
        await asyncio.sleep(delay_s)

    async def _clear(self, process: Process) -> None:
        """Wait for what a dead process had started, and strike it from the roster."""
        await asyncio.to_thread(end_entries, self.roster.of(process.name), CHILDREN_S)
        self.roster.remove(process.name)

    async def _look(self) -> None:
        """Keep the roster, notice when nothing moves, and put workers to death that the replay server has lost though
        their process lives."""
        while True:
            await asyncio.sleep(LOOK_S)
            pulses = await self.pulses()
            counters = {f"{name} {key}": n for name, p in pulses.items() if p for key, n in p.progress.items()}
            self.still_s = self._stall.feed(time.monotonic(), counters)
            if not all(process.up.is_set() for process in self.processes):
                self.note_progress()  # a start has a deadline of its own
            for process in self.processes:
                pulse = pulses[process.name]
                if pulse and process.up.is_set() and process.entry in pulse.entries:
                    self.roster.set(process.name, pulse.entries)
            replay = pulses[self.replay.name]
            if replay and replay.filling:
                self.on_filling(replay.filling)
            for worker in [self.workers[index] for index in (replay.lost if replay else ())]:
                if worker.up.is_set() and time.monotonic() - worker.since > JOIN_S:
                    log.warning("%s has fallen silent: it is killed", worker.name)
                    worker.end()

    async def _pulse(self, process: Process) -> Pulse | None:
        try:
            async with asyncio.timeout(SILENT_ANSWER_S if process.name in self._silent else ANSWER_S):
                pulse = await process.call(lambda process: process.pulse)
        except (TimeoutError, RunError):
            self._silent.add(process.name)
            return None
        self._silent.discard(process.name)
        return pulse

    async def _bring_up_replay(self, start: Start) -> Opened:
        """Until it is up, and leases again if it did so before. Returns what the others need to know of it."""

        async def begin_life() -> Opened:
            await self._spawn(self.replay, start_replay, start)
            if self.leasing:
                await self.replay.call(lambda replay: replay.begin)
            return await self.replay.call(lambda replay: replay.opened)

        return await self._bring_up(self.replay, begin_life)

    async def _bring_up_worker(self, worker: Process[RolloutProcess]) -> None:
        """After the others of its bundle: vLLM measures what is free on a GPU while it starts, and would count as its
        own what others allocate meanwhile."""
        memory_fraction = self.placement.memory_fraction(worker.name, self.config.rollout.memory_fraction)
        outlives = RunError if worker.life else ProcessDied
        async with self._turns[self.placement.index(worker.name)]:
            await self._bring_up(
                worker,
                lambda: self._spawn(worker, start_rollout, self.opened.rollout_address, memory_fraction),
                outlives,
            )

    async def _bring_up(
        self, process: Process[Any], begin_life: Callable[[], Awaitable[R]], outlives: type[RunError] = ProcessDied
    ) -> R:
        """Begin lives until one of them is up. Returns what that `begin_life` returns. `outlives`: errors of a start
        that don't end the run."""
        while True:
            try:
                answer = await begin_life()
            except outlives as death:
                await self._pause(process, death)
                continue
            process.up.set()
            self.note_progress()
            return answer

    async def _spawn(
        self,
        process: Process[P],
        begin: Callable[Concatenate[ProcessSpec, Params], Awaitable[P]],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> None:
        """Begin its next life, as what `begin` returns there."""
        process.spawn()
        entry = await self._within_start_timeout(process, process.identify())
        self.roster.set(process.name, [entry])
        await self._within_start_timeout(process, process.start(begin, *args, **kwargs))

    async def _within_start_timeout(self, process: Process[Any], call: Coroutine[Any, Any, R]) -> R:
        """The answer of a process that loads a model or opens data."""
        timeout_s = self.config.controller.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except TimeoutError:
            raise RunError(f"{process.name} is not ready after controller.start_timeout_s ({timeout_s:g} s)") from None
