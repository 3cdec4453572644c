"""The processes of a run on Ray: calls to them, and what a death means.

Every Ray call goes through `Process._answer`, the one place where Ray's errors become ours: an error of ours keeps its
kind and gains the name of its process, a death is `ProcessDied`, a defect carries the traceback of its process as its
cause. A `Process` outlives its Ray actor: started again, it is the same process in its next life.

Does not own: when a process is started again (`fleet`), what the commands do (`controller/roles`).
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from asyncdapo.controller.fleet.rooms import Room
from asyncdapo.controller.process.health import Health
from asyncdapo.controller.process.roster import Entry, is_running, this_host
from asyncdapo.controller.roles.actors import Actor
from asyncdapo.controller.roles.base import ProcessBase, ProcessSpec
from asyncdapo.errors import RunError, UserError

P_co = TypeVar("P_co", bound=ProcessBase, covariant=True)
P = TypeVar("P", bound=ProcessBase)
Params = ParamSpec("Params")
R = TypeVar("R")
Pick = Callable[[P], Callable[Params, Coroutine[Any, Any, R]]]
"""Picks a method of what runs in a process."""

MAX_CONCURRENCY = 64
"""Ray calls that one process serves at a time: commands, besides its `serve`."""

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Has malloc of glibc ask for them where the kernel leaves that to programs. It reads this at a program's start only. A
train step on a CPU takes 5 % less time."""

NODE_DIED = "its node has died"
"""In Ray's report, which has no other sign of it."""

CAUSE_GRACE_S = 2.0
"""Time for a death to become known, when what failed first may be a call to the process that died."""


class ProcessDied(RunError):  # noqa: N818 - what happened to it, not a failure of ours
    """A process ended without saying why: killed, out of memory, crashed in native code."""

    def __init__(self, name: str, how: str) -> None:
        super().__init__(f"{name}: the process died: {how}")
        self.name = name


class NodeDied(ProcessDied):
    """Its node is gone. Ray says so some 12 s late, and may have begun a life there meanwhile."""


class Process(Generic[P_co]):
    """A process of the run, by its name in logs and errors, through all its lives. `P_co` is what runs in it: a command
    is a method of that class, which a lambda picks: `await replay.call(lambda replay: replay.roll_back, step, reason)`.
    The lambda travels to the process, so it may not use anything but its own argument."""

    def __init__(self, name: str, create: Callable[[], Any], place: Callable[[], Mapping[str, Any]] = dict) -> None:
        """`create` starts a Ray actor and returns its handle; its constructor runs in the background. `place`: with
        which Ray starts something where this process lives."""
        self.name, self._place = name, place
        self.up = asyncio.Event()
        """Set while it is started and not known to be dead."""
        self.life = 0
        self.entry: Entry | None = None
        """Who it is in this life; None until it says so."""
        self.since = math.nan
        """Start of this life, `time.monotonic`."""
        self._create, self._actor, self._prepared = create, None, False

    @classmethod
    def placed(
        cls, actor: type[Actor[P_co]], spec: ProcessSpec, *, rooms: Mapping[str, Room], threads: int
    ) -> Process[P_co]:
        """A process each of whose lives is in the room that it has then."""
        options = {
            "max_concurrency": MAX_CONCURRENCY,
            "runtime_env": {
                "env_vars": {
                    "OMP_NUM_THREADS": str(threads),
                    "TOKENIZERS_PARALLELISM": "false",
                    "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", HUGE_PAGES),
                },
            },
        }
        return cls(
            spec.name,
            lambda: ray.remote(actor).options(**options, **rooms[spec.name].options()).remote(spec),
            lambda: rooms[spec.name].options() | {"num_cpus": 0, "num_gpus": 0},
        )

    def prepare(self) -> None:
        """Begin its next life before what it needs for its start is known: it loads its libraries meanwhile."""
        self.spawn()
        self._prepared = True
        assert self._actor is not None, "it was created"
        self._actor.load.remote()  # what this raises, its start raises again

    def spawn(self) -> None:
        """Begin its next life, unless it was prepared. It is `up` when its owner says so."""
        if self._prepared:
            self._prepared = False
            return
        self.end()
        self.life += 1
        self.since = time.monotonic()
        self._actor = self._create()

    def end(self) -> None:
        """Kill what is left of this life. A stopped process doesn't answer Ray, so it is killed by its pid,
        too."""
        self.up.clear()
        self._prepared = False
        if self.entry is not None and is_running(self.entry):
            with suppress(ProcessLookupError):
                os.kill(self.entry.pid, signal.SIGKILL)
        self.entry = None
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    async def beside(self, work: Callable[Params, R], *args: Params.args, **kwargs: Params.kwargs) -> R:
        """What `work` returns on the host of this process, which doesn't take part in it."""
        if self.entry is None or self.entry.host == this_host():
            return await asyncio.to_thread(work, *args, **kwargs)
        return await self._answer(lambda _: ray.remote(work).options(**self._place()).remote(*args, **kwargs))

    async def identify(self) -> Entry:
        """Learn who it is in this life. Raises as `call`."""
        self.entry = entry = await self._answer(lambda actor: actor.entry.remote())
        return entry

    async def start(
        self,
        begin: Callable[Concatenate[ProcessSpec, Params], Awaitable[P_co]],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> None:
        """Have the process become what `begin` returns there; until then it answers no command. Raises as `call`."""
        await self._answer(lambda actor: actor.start.remote(begin, *args, **kwargs))

    async def call(self, pick: Pick[P_co, Params, R], *args: Params.args, **kwargs: Params.kwargs) -> R:
        """What the process answers. Raises ProcessDied, or UserError or RunError that names the process."""
        return await self._answer(lambda actor: actor.call.remote(pick, *args, **kwargs))

    async def health(self) -> Health:
        """How it is, also while it is being started. Raises as `call`."""
        return await self._answer(lambda actor: actor.health.remote())

    async def ask(self, pick: Pick[P_co, Params, R], *args: Params.args, **kwargs: Params.kwargs) -> R:
        """As `call`, and again in its next life when it died under the call: for commands that may be repeated."""
        while True:
            await self.up.wait()
            try:
                return await self.call(pick, *args, **kwargs)
            except ProcessDied:
                continue

    async def _answer(self, send: Callable[[Any], Awaitable[R]]) -> R:
        """What the Ray actor of this life answers. Ray's errors become ours."""
        actor = self._actor
        if actor is None:
            raise ProcessDied(self.name, "it is being started again")
        try:
            return await send(actor)
        except RayTaskError as error:
            raise self._translated(error) from (None if isinstance(error.cause, RunError | UserError) else error)
        except RayActorError as error:
            if actor is self._actor:
                self.up.clear()
            died = NodeDied if NODE_DIED in str(error) else ProcessDied
            raise died(self.name, _reason(error) + self._elsewhere()) from None
        except RayError as error:
            raise RunError(f"{self.name}: {type(error).__name__}") from error

    def _elsewhere(self) -> str:
        """For a message: on which other host it is."""
        return f" (on {self.entry.host})" if self.entry and self.entry.host != this_host() else ""

    def _translated(self, error: RayTaskError) -> UserError | RunError:
        cause = error.cause
        if isinstance(cause, UserError):
            return UserError(f"{self.name}: {cause}")
        if isinstance(cause, RunError):
            return type(cause)(f"{self.name}: {cause}")
        return RunError(f"{self.name}: {type(cause).__name__}: {cause}")


class Watch:
    """The one set of everything that must last as long as the run does. The first that ends, with an error or
    without, ends the run."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], str] = {}
        self._ended: list[asyncio.Task[Any]] = []
        """In this order: others may have ended because of the first."""
        self._one_ended = asyncio.Event()

    def add(self, name: str, work: Coroutine[Any, Any, Any]) -> None:
        """Watch work that should not end, from now on."""
        task = asyncio.ensure_future(work)
        self._tasks[task] = name
        task.add_done_callback(self._note_end)

    async def guard(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work` to its end, unless a watched task ends before; then `work` is cancelled and the cause raised."""
        main, ended = asyncio.ensure_future(work), asyncio.ensure_future(self._one_ended.wait())
        try:
            await asyncio.wait([main, ended], return_when=asyncio.FIRST_COMPLETED)
            if main.done() and isinstance(main.exception(), RunError):
                await asyncio.wait([ended], timeout=CAUSE_GRACE_S)
            self._raise_if_one_ended()
            return await main
        finally:
            everything = [main, ended, *self._tasks]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)

    def _note_end(self, task: asyncio.Task[Any]) -> None:
        self._ended.append(task)
        self._one_ended.set()

    def _raise_if_one_ended(self) -> None:
        if self._ended:
            first = self._ended[0]
            first.result()
            raise RunError(f"{self._tasks[first]} ended before the run did")


def _reason(error: RayActorError) -> str:
    """What Ray's report says of the way in which the process ended, without its advice."""
    if isinstance(error, ActorUnavailableError):
        return "Ray has lost the connection to it"
    if NODE_DIED in str(error):
        return NODE_DIED
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes| There are some potential root|$)", str(error))
    if detail:
        return detail[1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "killed" in line.lower()), lines[0])
