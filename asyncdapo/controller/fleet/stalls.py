"""Stalls: waits for work of unknown length as long as it takes, but never in silence.

In: work, and whom it is waited for. Out: its result. Every `controller.report_wait_s` it says the root of the wait.
When no counter of progress in any process has moved for `controller.stall_s`, it prints the whole chain of waits with
the stacks of the processes in it, and kills those at its root. The fleet starts them again. A request to stop the run
ends the waits that may be ended (`Stopped`); the others last until their work is done.

Does not own: what is waited for (`run`), who waits for whom elsewhere (each process's own `Waits`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from typing import TypeVar

from asyncdapo.accounting.spans import Span
from asyncdapo.config.run import ControllerConfig
from asyncdapo.controller.fleet.fleet import LOOK_S
from asyncdapo.controller.fleet.process import Process
from asyncdapo.controller.fleet.supervisor import ANSWER_S, Supervisor
from asyncdapo.controller.process.health import Health
from asyncdapo.controller.process.stacks import DUMP_S, ask
from asyncdapo.controller.process.waits import NOBODY, UNKNOWN, Wait, chain, processes_in, render
from asyncdapo.controller.roles.base import ProcessBase
from asyncdapo.errors import RunError
from asyncdapo.metrics.reporter import View

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 - a wish, not an error
    """The run was asked to stop, and what was waited for isn't worth finishing."""


class StallWatch:
    """The waits of the controller."""

    def __init__(self, config: ControllerConfig, supervisor: Supervisor, view: View) -> None:
        self._config, self._supervisor, self._view = config, supervisor, view
        self._breaking = asyncio.Lock()
        """Several waits may see the same stall; one of them breaks it."""
        self.stopping = asyncio.Event()
        """The run was asked to stop."""

    async def wait(self, work: Awaitable[T], *, whom: str, what: str, until_stopped: bool = False) -> T:
        """The result of `work`, or Stopped. Cancelling cancels the work."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self.stopping.wait())
        ends = {task, stop} if until_stopped else {task}
        report_at = time.monotonic() + self._config.report_wait_s
        try:
            with self._supervisor.waits.on(whom, what):
                while not task.done():
                    done, _ = await asyncio.wait(ends, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                    if stop in done and not task.done():
                        raise Stopped
                    if self._supervisor.still_s >= self._config.stall_s:
                        async with self._breaking:
                            if self._supervisor.still_s >= self._config.stall_s:
                                await self._break_stall()
                    elif not done and time.monotonic() >= report_at:
                        report_at += self._config.report_wait_s
                        await self._report()
            return task.result()
        finally:
            stop.cancel()
            task.cancel()

    def take_spans(self) -> list[Span]:
        """The controller's waits that ended since the `take_spans` before."""
        return self._supervisor.waits.take_spans()

    async def _report(self) -> None:
        """Say what is waited for, what the next batch lacks, and the root of it all; of several, one that does not
        answer."""
        links, _ = await self._chain()
        roots = sorted((wait for wait in links[1:] if wait.is_root), key=lambda wait: wait.whom == UNKNOWN)
        batch = [wait for wait in links[1:] if wait.who == "replay" and not wait.is_root]
        lines = render([links[0], *batch[:1], roots[-1]] if roots else links).splitlines()
        self._view.status("; ".join(lines if roots else dict.fromkeys((lines[0], lines[-1]))))

    async def _chain(self) -> tuple[list[Wait], Mapping[str, Health | None]]:
        """From the controller's oldest wait to its roots, and what every process said."""
        reports = await self._supervisor.health()
        waits: dict[str, list[Wait] | None] = {name: report and list(report.waits) for name, report in reports.items()}
        for process in self._supervisor.processes:
            if not process.up.is_set():
                waits[process.name] = [Wait(who=process.name, whom=NOBODY, what="is being started")]
        for name, what in self._supervisor.missing.items():
            waits[name] = [Wait(who=name, whom=NOBODY, what=what)]
        return chain(waits | {"controller": self._supervisor.waits.open()}, "controller"), reports

    async def _break_stall(self) -> None:
        """Print who waits for whom and where they stand, then kill who is at the root. Raises RunError when the root is
        no process that could be started again."""
        still_s = self._supervisor.still_s
        links, reports = await self._chain()
        self._view.note(f"stalled: nothing has moved for {still_s:.0f} s\n{render(links)}")
        by_name = {process.name: process for process in self._supervisor.processes}
        for name in processes_in(links):
            if name in by_name:
                self._view.note(f"stacks of {name}:\n{await self._stacks(by_name[name], reports[name])}")
        roots = [by_name[wait.who] for wait in links if wait.is_root and wait.who in by_name]
        if not roots:
            raise RunError(f"nothing has moved for {still_s:.0f} s: {render(links)}")
        for process in roots:
            self._view.note(f"{process.name} is killed and started again: it is what the others wait for")
            process.end()
        self._supervisor.note_progress()

    async def _stacks(self, process: Process[ProcessBase], report: Health | None) -> str:
        if report and process.up.is_set():
            stacks = process.call(lambda process: process.stacks)
        elif process.entry:
            stacks = process.beside(ask, process.entry, self._supervisor.log_path(process))
        else:
            return "it is being started"
        try:
            async with asyncio.timeout(DUMP_S + ANSWER_S):
                return await stacks
        except (TimeoutError, RunError) as error:
            return f"no answer ({error})"
