"""A process that can be killed at any step.

In: work, calls of others, death. Out: answers, or `ProcessDied` to whoever waits for one. Invariant: what it has in
memory is gone with it; it sends and writes nothing from its death on, not even while its tasks unwind (sockets and
journal see to that). Does not own: who is started when (`controller`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

from asyncdapo.errors import RunError

if TYPE_CHECKING:
    from tests.simulation.world import World


class Killed(BaseException):
    """The process is dead; nothing may catch this."""

    def __init__(self, point: str = "") -> None:
        self.point = point


class ProcessDied(Exception):  # noqa: N818 - named as the product's own
    """Whoever called it gets no answer."""


class Process:
    """One life."""

    role: str

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.alive = world, name, True
        self.sockets: list = []
        self.dead: asyncio.Future[None] = world.loop.create_future()
        self.on_death: Callable[[], None] = lambda: None
        self._tasks: set[asyncio.Task] = set()
        self._answers: set[asyncio.Future] = set()
        self._context = copy_context()
        self._context.run(CURRENT.set, self)

    def inside(self, make: Any, *args: Any, **options: Any) -> Any:
        """Call as this process."""
        return self._context.run(partial(make, *args, **options))

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task:
        """A task of this process; if it is killed there, all of it is."""
        task = self.world.loop.create_task(work, context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    async def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What the process answers. Raises ProcessDied when it dies before it does."""
        if not self.alive:
            work.close()
            raise ProcessDied(self.name)
        answer = self.world.loop.create_future()
        self._answers.add(answer)
        self.spawn(work).add_done_callback(partial(self._answer, answer))
        try:
            return await answer
        finally:
            self._answers.discard(answer)

    def _answer(self, answer: asyncio.Future, task: asyncio.Task) -> None:
        if answer.done() or task.cancelled():
            return
        if error := task.exception():
            answer.set_exception(ProcessDied(self.name) if isinstance(error, Killed) else error)
        else:
            answer.set_result(task.result())

    def _note_end(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Killed):
            self.die(error.point)
        elif isinstance(error, RunError):
            self.world.date(error)
        elif error is not None and not isinstance(error, ProcessDied):
            self.world.fail(error)

    def die(self, why: str) -> None:
        """As by SIGKILL."""
        if not self.alive:
            return
        self.alive = False
        self.world.note(f"{self.role} deaths", f"{self.name} dies: {why}")
        self.world.note(f"{self.role} {why}", "")
        for socket in self.sockets:
            socket.close()
        for task in self._tasks:
            task.cancel()
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(ProcessDied(self.name))
        self.on_death()
        self.dead.set_result(None)


CURRENT: ContextVar[Process] = ContextVar("process")
