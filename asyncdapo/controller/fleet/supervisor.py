"""The supervisor of the processes on Ray: brings them up, notices and counts their deaths, asks them how they are.

In: processes, and what begins a life of one. Out: processes that are up, the roster, their reports, and for how long
nothing has moved. Invariant: a process is `up` only when it was started completely; deaths are counted against a budget
(`restarts`), past which the run ends with the cause of the last one. Does not own: which processes there are, what a
death means for the others (`fleet`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Concatenate

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.process import NodeDied, P, Params, Process, ProcessDied, R
from asyncdapo.controller.process.health import Health
from asyncdapo.controller.process.restarts import Restarts
from asyncdapo.controller.process.roster import Roster, this_process
from asyncdapo.controller.process.roster import end as end_entries
from asyncdapo.controller.process.waits import Stall, Waits
from asyncdapo.controller.roles.base import ProcessBase, ProcessSpec, log_path
from asyncdapo.errors import RunError, VerdictError

ANSWER_S = 5.0
"""A process whose event loop is free answers at once."""
SILENT_ANSWER_S = 1.0
"""What is granted to one that gave no answer the last time, so that a process that hangs doesn't hold up the looks."""
CHILDREN_S = 1.0
"""Time for what a dead process had started to notice it."""

log = logging.getLogger("controller")


class Supervisor:
    """Of all processes of one launch."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._restarts = Restarts(config.controller.max_restarts, time.monotonic)
        self._roster = Roster(Path(config.run.dir))
        self._roster.set("controller", [this_process("controller")])
        self._stall = Stall(time.monotonic())
        self._silent: set[str] = set()
        self.waits = Waits("controller")
        """Of the controller itself."""
        self.processes: list[Process[ProcessBase]] = []
        """All that are up or being started; none before the fleet is placed."""
        self.missing: dict[str, str] = {}
        """What others wait for, by name."""
        self.still_s = 0.0
        """For how long no counter of progress has moved in any process, and none was being started."""

    def note_progress(self) -> None:
        """Something has happened that no counter shows."""
        self._stall.reset(time.monotonic())
        self.still_s = 0.0

    def include(self, process: Process[ProcessBase]) -> None:
        """It is about to be started, or is up."""
        self.missing.pop(process.name, None)
        if process not in self.processes:
            self.processes.append(process)

    def miss(self, process: Process[ProcessBase], what: str) -> None:
        """It should be started, and can't be: `what` it waits for."""
        self.forget(process)
        self.missing[process.name] = what

    def forget(self, process: Process[ProcessBase]) -> None:
        """It isn't wanted."""
        self.missing.pop(process.name, None)
        if process in self.processes:
            self.processes.remove(process)

    def hears_from(self, process: Process[ProcessBase]) -> bool:
        """Whether it is up, and answered when it was looked at last."""
        return process.up.is_set() and process.name not in self._silent

    def log_path(self, process: Process[ProcessBase]) -> Path:
        """The process's own log."""
        return log_path(self._config, process.name)

    # ---------------------------------------------------------------------------------------------------------- lives

    async def bring_up(
        self,
        process: Process[ProcessBase],
        begin_life: Callable[[], Awaitable[R]],
        outlives: type[RunError] = ProcessDied,
    ) -> R:
        """Begin lives until one of them is up. Returns what that `begin_life` returns. `outlives`: errors of a start
        that don't end the run."""
        while True:
            try:
                answer = await begin_life()
            except outlives as death:
                await self.pause(process, death)
                continue
            self.is_up(process)
            return answer

    async def start(
        self,
        process: Process[P],
        begin: Callable[Concatenate[ProcessSpec, Params], Awaitable[P]],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> None:
        """Begin its next life, as what `begin` returns there. It isn't `up` yet."""
        process.spawn()
        entry = await self.within_start_timeout(process, process.identify())
        self._roster.set(process.name, [entry])
        await self.within_start_timeout(process, process.start(begin, *args, **kwargs))

    def is_up(self, *processes: Process[ProcessBase]) -> None:
        """They were started completely."""
        for process in processes:
            process.up.set()
        self.note_progress()

    async def keep(
        self,
        process: Process[ProcessBase],
        serve: Callable[[], Awaitable[None]],
        revive: Callable[[RunError], Awaitable[None]],
        outlives: type[RunError] = ProcessDied,
    ) -> None:
        """Notice each death of a process that is up. `serve` lasts as long as one of its lives; `revive` begins the
        next, and says what the death means for the others. `outlives`: what may end a life and not the run."""
        while True:
            try:
                await serve()
                raise RunError(f"{process.name} ended before the run did")
            except VerdictError:
                raise
            except outlives as death:
                await revive(death)

    async def pause(self, process: Process[ProcessBase], death: Exception) -> None:
        """Count the death, say it, wait a little longer after each. Raises RunError past the budget."""
        process.end()
        delay_s = self.count_death(process.name, death)
        log.warning("%s; it is started again", death)
        await self.clear(process)
        await asyncio.sleep(delay_s)

    def count_death(self, name: str, death: Exception) -> float:
        """Returns how long to wait before the next start, in seconds. Raises RunError past the budget, to which the
        loss of a node doesn't count."""
        return 0.0 if isinstance(death, NodeDied) else self._restarts.delay_s(name, death)

    async def clear(self, process: Process[ProcessBase]) -> None:
        """Wait for what a dead process had started, and strike it from the roster."""
        await asyncio.to_thread(end_entries, self._roster.of(process.name), CHILDREN_S)
        self._roster.remove(process.name)

    async def within_start_timeout(self, process: Process[ProcessBase], call: Coroutine[Any, Any, R]) -> R:
        """The answer of a process that loads a model or opens data."""
        timeout_s = self._config.controller.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except TimeoutError:
            raise RunError(f"{process.name} is not ready after controller.start_timeout_s ({timeout_s:g} s)") from None

    # --------------------------------------------------------------------------------------------------------- reports

    async def look(self) -> Mapping[str, Health | None]:
        """Keep the roster, and notice when nothing moves. Returns the reports."""
        reports = await self.health()
        counters = {f"{name} {key}": n for name, p in reports.items() if p for key, n in p.progress.items()}
        self.still_s = self._stall.feed(time.monotonic(), counters)
        if not all(process.up.is_set() for process in self.processes):
            self.note_progress()  # a start has a deadline of its own
        for process in self.processes:
            report = reports.get(process.name)
            if report and process.up.is_set() and process.entry in report.entries:
                self._roster.set(process.name, report.entries)
        return reports

    async def health(self) -> Mapping[str, Health | None]:
        """Of every process; None where there is no answer."""
        processes = list(self.processes)
        answers = await asyncio.gather(*map(self._health_of, processes))
        return dict(zip((process.name for process in processes), answers, strict=True))

    async def _health_of(self, process: Process[ProcessBase]) -> Health | None:
        try:
            async with asyncio.timeout(SILENT_ANSWER_S if process.name in self._silent else ANSWER_S):
                report = await process.health()
        except (TimeoutError, RunError):
            self._silent.add(process.name)
            return None
        self._silent.discard(process.name)
        return report
