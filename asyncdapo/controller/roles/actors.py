"""The Ray actors of a run: one class per role, whose name shows in process lists, and one way to call any of them.

The driver imports only these. What a process is made of is imported in the process itself: the driver and the replay
server never load torch, and all processes of a launch import at the same time.

In: commands of the controller (`call`). Out: what the method that the command picks answers; what it raises reaches the
controller as that call's error. Does not own: what the commands do (`ReplayProcess`, `RolloutProcess`,
`LearnerProcess`), how the controller calls (`fleet/process`).
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from asyncdapo import faults
from asyncdapo.controller.process.health import Health
from asyncdapo.controller.process.notice import LeaveNotice
from asyncdapo.controller.process.roster import Entry
from asyncdapo.controller.process.stacks import install as install_stacks
from asyncdapo.controller.roles.base import ProcessBase, ProcessSpec
from asyncdapo.controller.roles.opening import Start
from asyncdapo.errors import RunError

if TYPE_CHECKING:
    from asyncdapo.controller.roles.learner import LearnerProcess
    from asyncdapo.controller.roles.replay import ReplayProcess
    from asyncdapo.controller.roles.rollout import RolloutProcess

P = TypeVar("P", bound=ProcessBase)
R = TypeVar("R")

GIVES_WAY = 10
"""Niceness of a worker beside that of the others: on cores that both use, the learner gets nine times its share. The
train step is what all wait for in the end, and every further worker would slow it down, also while it starts."""


class Actor(Generic[P]):
    """Hosts one process. An async actor: commands run in its event loop, `serve` as long as the process lives."""

    def __init__(self, spec: ProcessSpec) -> None:
        _open_log(spec.log_path)
        faults.install(spec.name, spec.config.faults, Path(spec.config.run.dir))
        self._spec = spec
        self._running: P | None = None

    async def load(self) -> None:
        """Import what this process is made of."""
        _import_to_stay(f"{__package__}.{self._spec.role}")

    async def entry(self) -> Entry:
        """Who this process is."""
        return self._spec.entry()

    async def start(self, begin: Callable[..., Awaitable[P]], *args: Any) -> None:
        """Become what `begin` returns."""
        await self.load()
        self._running = await begin(self._spec, *args)

    async def call(self, pick: Callable[[P], Callable[..., Awaitable[R]]], *args: Any, **kwargs: Any) -> R:
        """What the process's method that `pick` picks returns."""
        if self._running is None:
            raise RunError("it is being started")
        return await pick(self._running)(*args, **kwargs)

    async def health(self) -> Health:
        """How it is; of one that is being started, who it is."""
        return await self._running.health() if self._running else Health(entries=[self._spec.entry()], waits=[])


class ReplayActor(Actor["ReplayProcess"]):
    """The replay server."""


class RolloutActor(Actor["RolloutProcess"]):
    """A rollout worker. SIGTERM asks it to leave, also while it is being started."""

    def __init__(self, spec: ProcessSpec) -> None:
        self._notice = LeaveNotice()
        os.nice(GIVES_WAY)  # of the event loop's thread, and of all threads and processes that it starts
        super().__init__(spec)

    async def health(self) -> Health:
        return replace(await super().health(), leaving="SIGTERM" if self._notice.has_come else "")


class LearnerActor(Actor["LearnerProcess"]):
    """A rank of the learner."""


async def start_replay(spec: ProcessSpec, start: Start) -> ReplayProcess:
    """See `ReplayProcess.start`."""
    from asyncdapo.controller.roles.replay import ReplayProcess

    return await ReplayProcess.start(spec, start)


async def start_rollout(spec: ProcessSpec, replay_address: str, memory_fraction: float) -> RolloutProcess:
    """See `RolloutProcess.start`."""
    from asyncdapo.controller.roles.rollout import RolloutProcess

    return await RolloutProcess.start(spec, replay_address, memory_fraction)


async def start_learner(spec: ProcessSpec, replay_address: str) -> LearnerProcess:
    """See `LearnerProcess.start`."""
    from asyncdapo.controller.roles.learner import LearnerProcess

    return await LearnerProcess.start(spec, replay_address)


def _import_to_stay(module: str) -> None:
    """Import without the garbage collector, which would walk all that was imported before again and again: a sixth of a
    learner's import. Afterwards it leaves the modules alone, or a full pass would stop the process for 0.1 s."""
    if module in sys.modules:
        return
    gc.disable()
    try:
        importlib.import_module(module)
    finally:
        gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else some libraries report all that is left at the end


def _open_log(path: Path) -> None:
    """This process's own log. What it and its children print goes there too, such as why vLLM could not start, and the
    stacks of a crash in native code."""
    path.parent.mkdir(exist_ok=True)
    stream = path.open("a", buffering=1)
    for printed in (1, 2):
        os.dup2(stream.fileno(), printed)
    logging.basicConfig(stream=stream, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    faulthandler.enable(stream)
    install_stacks(stream)
