"""One simulated run: its clock, its disk, its network, whoever is alive, and what is done to them.

In: a plan. Out: how it went (`Outcome`), or an AssertionError that says what was broken. Everything that happens hangs
on the seed alone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

from asyncdapo import faults
from asyncdapo.errors import RunError
from asyncdapo.learner.batches import feed as feed_module
from asyncdapo.replay.server import server as server_module
from asyncdapo.replay.server.workers import FromWorker
from asyncdapo.rollout import jobs as jobs_module
from asyncdapo.rollout import worker as worker_module
from asyncdapo.transport.codec import Limits
from tests.simulation.controller import Controller
from tests.simulation.disk import FileDisk, MemoryDisk
from tests.simulation.judge import Judge
from tests.simulation.loop import Deadline, VirtualLoop
from tests.simulation.plan import Plan, draw
from tests.simulation.process import CURRENT, Killed, ProcessDied
from tests.simulation.replay import LEARNER_ADDRESS, ROLLOUT_ADDRESS
from tests.simulation.sockets import Client, Network, Server

PATIENCE_S = 300.0
"""Simulated seconds without any fault in which a run must come to its end."""
RELAUNCH_S = 1.0
BAD_LUCK = ("damaged", "nothing has been heard", "and never answered", "can't be written")
"""Ends that faults can cause and that say so; another launch resumes."""
LAWFUL_ENDS = ("filter.max_gen_batches", "no batch was ever full")
"""Ends that the configuration and the prompts bring about."""


@dataclass
class Outcome:
    """How a run went."""

    steps: int
    end: str
    """What the run said at its end; nothing when it had all its steps or all its data."""
    counts: Counter[str]
    simulated_s: float
    trace: list[str]


def simulate(seed: int, *, files: bool = False, trace: bool = False) -> Outcome:
    """The run of a seed. `files`: on real files. `trace`: keep a line for everything that happens."""
    plan = draw(seed)
    disk = (FileDisk if files else MemoryDisk)(plan.segment_bytes)
    world = World(plan, disk, trace)
    logging.disable(logging.CRITICAL)
    try:
        with disk.mounted(), world.in_place():
            try:
                end = world.loop.run(world.main(), lambda: world.settled_at + PATIENCE_S)
                world.judge.check_end(world.controller)
            except Deadline:
                waits = world.why_waiting()
                raise AssertionError(f"no end within {PATIENCE_S:g} s without faults: {waits}") from None
            finally:
                world.over = True
                world.controller.end()
                world.loop.drain()
    except BaseException as error:
        error.trace = world.lines
        raise
    finally:
        logging.disable(logging.NOTSET)
    return Outcome(world.controller.step, end, world.counts, world.loop.time(), world.lines)


class World:
    """Whatever the processes of one run share without knowing it."""

    def __init__(self, plan: Plan, disk: MemoryDisk, trace: bool) -> None:
        self.plan, self.disk = plan, disk
        self.loop = VirtualLoop()
        self.network = Network(self.loop, plan.links)
        self.judge = Judge(self)
        self.counts: Counter[str] = Counter()
        self.lines: list[str] = []
        self.traced = trace
        self.launched = self.settled = self.over = False
        self.settled_at = plan.settles_at
        self._rng = random.Random(f"{plan.seed} world")
        self._weights, self._requests, self._sessions = count(1), count(1), count(1)
        self._passed: Counter[tuple[str, str]] = Counter()
        self._num_writes = self._num_lawful = 0

    async def main(self) -> str:
        """Launch until the run is over. Returns what it said at its end."""
        self._arm()
        steps = self.plan.steps
        while True:
            self.failure: asyncio.Future[None] = self.loop.create_future()
            self.controller = Controller(self, steps)
            try:
                await self._launch()
                self.judge.check_ended_well(self.controller)
                if steps > self.plan.steps or not self.plan.more_steps:
                    return ""
                steps += self.plan.more_steps
            except ProcessDied:
                if self.plan.harmful_deaths:
                    self._do_harm()
            except RunError as error:
                if self._is_final(error):
                    return str(error)
            self.controller.end()
            await asyncio.sleep(RELAUNCH_S)

    def _is_final(self, error: RunError) -> bool:
        """Whether it makes no sense to launch again. Without faults no run ends by bad luck."""
        end = str(error)
        lawful = any(words in end for words in LAWFUL_ENDS)
        self.date(error)
        assert lawful or (error.among_faults and any(words in end for words in BAD_LUCK)), end
        self._num_lawful += lawful
        return lawful and (self.settled or self._num_lawful > 1)

    async def _launch(self) -> None:
        running = self.loop.create_task(self.controller.call(self.controller.run()))
        await asyncio.wait([running, self.failure], return_when=asyncio.FIRST_COMPLETED)
        if self.failure.done():
            running.cancel()
            self.failure.result()
        running.result()

    # ---------------------------------------------------------------------------------------------------------- faults

    def _arm(self) -> None:
        plan, later = self.plan, self.loop.call_at
        for at, role in plan.kills_at:
            later(at, self._kill, role)
        for at, how_long, index in plan.cuts:
            later(at, self._cut_off, f"rollout-{index}")
            later(at + how_long, self.network.cut_off.discard, f"rollout-{index}")
        for at, *how in plan.leaves:
            later(at, self._ask_to_leave, *how)
        for at in plan.stops:
            later(at, self._stop)
        for at in plan.harms_at:
            later(at, self._do_harm)
        later(plan.settles_at, self.settle)

    def _kill(self, role: str) -> None:
        if self.settled:
            return
        controller = self.controller
        slots = {"replay": controller.replay, "learner": controller.learner, "controller": None}
        slot = slots.get(role, self._rng.choice(controller.workers))
        process = controller if role == "controller" else slot.process
        if process:
            process.die("killed")

    def _ask_to_leave(self, within_s: float, away_s: float, index: int) -> None:
        if not self.settled and index < len(self.controller.workers):
            self.note("leaves", f"rollout-{index} is asked to leave within {within_s:g} s")
            self.controller.workers[index].leave(within_s, away_s)

    def _stop(self) -> None:
        if not self.settled and self.controller.alive:
            self.controller.spawn(self.controller.stop())

    def _cut_off(self, name: str) -> None:
        if not self.settled:
            self.note("cuts of a link", f"{name} is cut off")
            self.network.cut_off.add(name)

    def _do_harm(self) -> None:
        if not self.settled and self.disk.damage(self._rng):
            self.note("harmed payloads", "a payload is damaged")
            self.judge.forget()

    def settle(self) -> None:
        """From now on all goes well."""
        if not self.settled:
            self.note("", "all goes well from now on")
            self.settled, self.settled_at = True, self.loop.time()
            self.network.perfect = True
            self.network.cut_off.clear()

    def curse(self, prompt_id: int, *kinds: str) -> str | None:
        """What of `kinds` is wrong with the prompt."""
        curse = self.plan.curses.get(prompt_id)
        if self.settled or curse not in kinds:
            return None
        self.note(f"prompt {curse}", f"prompt {prompt_id} {curse}")
        return curse

    def tears(self) -> bool:
        return not self.settled and self._rng.random() < self.plan.tears

    # In place of `asyncdapo.faults._Faults`: what goes wrong inside a process.
    worker_s = 0.0

    def next_link(self) -> None:
        return None

    def pass_point(self, name: str) -> None:
        process = CURRENT.get()
        self._passed[process.role, name] += 1
        planned = (process.role, name, self._passed[process.role, name]) in self.plan.kills_in
        if not process.alive or (planned and not self.settled):
            raise Killed(name)

    def write(self, num_bytes: int) -> None:
        self._num_writes += 1
        if self._num_writes == self.plan.disk_full_at and not self.settled:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # ----------------------------------------------------------------------------------------------------------- rest

    def new_weights(self) -> int:
        return next(self._weights)

    def new_request(self) -> int:
        return next(self._requests)

    def fail(self, error: BaseException) -> None:
        """A process ends the run on purpose, or by a defect."""
        if not self.failure.done():
            self.failure.set_exception(error)

    def date(self, error: RunError) -> None:
        """Note, the first time, whether there were faults when it was raised. That of an early batch is said only when
        the train step is over."""
        vars(error).setdefault("among_faults", not self.settled)

    def note(self, kind: str, line: str) -> None:
        if kind and not self.over:
            self.counts[kind] += 1
        if self.traced and line:
            self.lines.append(f"{self.loop.time():8.3f}  {line}")

    def why_waiting(self) -> str:
        replay = self.controller.replay.process
        return replay.server._why_waiting() if replay and replay.alive else "the replay server is down"

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The product's modules get this world's sockets, clock, chance and faults."""
        clock = SimpleNamespace(monotonic=self.loop.time)
        chance = SimpleNamespace(token_hex=lambda _: f"{next(self._sessions)}")
        names = SimpleNamespace(urandom=lambda _: str(next(self._sessions)).encode())
        parts = [
            (server_module, "Server", self._make_server),
            (worker_module, "Client", self._make_client),
            (feed_module, "Client", self._make_client),
            (worker_module, "time", clock),
            (jobs_module, "time", clock),
            (worker_module, "secrets", chance),
            (feed_module, "os", names),
            (faults, "_faults", self),
        ]
        before = [(module, name, getattr(module, name)) for module, name, _ in parts]
        for module, name, part in parts:
            setattr(module, name, part)
        try:
            yield
        finally:
            for module, name, part in before:
                setattr(module, name, part)

    def _make_server(self, accepts: Any, host: str, *limits: Limits, port: int, curve: None) -> Server:
        address = ROLLOUT_ADDRESS if accepts == FromWorker else LEARNER_ADDRESS
        return Server(self.network, CURRENT.get(), accepts, address)

    def _make_client(self, address: str, accepts: Any, identity: bytes, *limits: Limits, curve: None) -> Client:
        return Client(self.network, CURRENT.get(), accepts, address, identity)
