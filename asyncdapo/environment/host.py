"""A host process as its pool sees it: start it, call the environments in it.

In: calls of episodes. Out: their answers, in any order. A host is killed when a call takes too long; the calls of the
other episodes then end without an answer. Its main is `in_host/host_main`. Does not own: the operating system's process
(`child/process`), what becomes of episodes without an answer (`hosts`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from asyncdapo.child.process import START_TIMEOUT_S, ChildProcess, Launched
from asyncdapo.environment.clock import Clock
from asyncdapo.errors import RunError
from asyncdapo.messages import Text
from asyncdapo.model.tool_calls import Tools

KIND = "environment host"
MAIN = "asyncdapo.environment.in_host.host_main"
PACKAGE = Path(__file__).parents[1]
IN_ANOTHER_INTERPRETER = (
    "import sys, types; package = types.ModuleType('asyncdapo'); package.__path__ = [sys.argv.pop(1)];"
    f" sys.modules['asyncdapo'] = package; from {MAIN} import main; main(int(sys.argv[1]))"
)
"""That has its own modules, and perhaps no asyncdapo: ours is found by its path, without what a plain import runs."""
MAX_ANSWER_BYTES = 1 << 24
"""More without the end of a line is nothing that a host says: the user's code has written to the socket."""

Call = Literal["reset", "step", "tools", "end", "run"]

log = logging.getLogger("environment")


class Answer(Struct, frozen=True):
    """host -> worker."""

    call: int
    observation: Text | None = None
    reward: float = 0.0
    metrics: dict[str, float] = {}
    num_chars: int = 0
    """Length of an observation that is too long to be sent; 0 for any other."""
    raised: str = ""
    """The environment's error."""
    broke: str = ""
    """How what it returned breaks the contract."""
    tools: list[dict[str, Any]] = []
    """JSON schemas of the environment's, once it is loaded."""


@dataclass(frozen=True)
class NoAnswer:
    """The host ended before it had answered."""

    fault: Literal["slow", "died", "none"]
    """Of this call: it took too long; the host died, and it may be why; or another call did, or the host was gone."""


@dataclass(frozen=True, kw_only=True)
class HostSetup:
    """What every host of a worker is started with."""

    path: str
    python: str | None
    tokenizer: str
    """Where the model's is."""
    concurrency: int
    max_chars: int

    def message(self) -> dict[str, Any]:
        """The first line. Another interpreter has its own modules."""
        paths = [] if self.python else [os.path.abspath(path) for path in sys.path]
        sizes = {"concurrency": self.concurrency, "max_chars": self.max_chars}
        return {"name": self.path, "import_path": paths, "tokenizer": self.tokenizer} | sizes

    def command(self) -> Sequence[str]:
        if self.python is None:
            return [sys.executable, "-u", "-m", MAIN, str(os.getpid())]
        return [self.python, "-u", "-c", IN_ANOTHER_INTERPRETER, str(PACKAGE), str(os.getpid())]


class HostProcess(ChildProcess):
    """One host from its start to its end. Create it with `start`."""

    def __init__(self, launched: Launched, concurrency: int) -> None:
        super().__init__(launched, KIND, log)
        self.tools: Tools = ()
        """What the model may call in every episode; known once the environment is loaded."""
        self._free = asyncio.Semaphore(concurrency)
        self._calls: set[asyncio.Task[Answer | NoAnswer]] = set()
        self._numbers = itertools.count()
        self._pending: dict[int, asyncio.Future[Answer | NoAnswer]] = {}
        self._late: int | None = None
        """The call that took too long."""
        self._unfinished = b""

    @classmethod
    async def start(cls, setup: HostSetup) -> HostProcess:
        """A host that has loaded the environment. Raises RunError, with its last lines of output, if it can't."""
        host = await cls.connected(lambda launched: cls(launched, setup.concurrency), setup.command())
        try:
            said = await host._ask(setup.message(), Clock(START_TIMEOUT_S, START_TIMEOUT_S))
        except BaseException:
            host.kill()
            raise
        if isinstance(said, Answer) and not said.raised:
            host.tools = said.tools
            return host
        how = await host.end()
        if isinstance(said, Answer):
            raise RunError(f"can't be loaded: {said.raised}")
        if said.fault == "slow":
            how = f"no answer in {START_TIMEOUT_S:g} s"
        raise RunError(": ".join([how, *host.last_lines]))

    async def call(self, episode: int, do: Call, given: Any, clock: Clock) -> Answer | NoAnswer:
        """The environment's answer. The wait for other calls takes no time of the clock. A call whose caller is
        cancelled is not withdrawn: its thread is in the user's code, and is bounded by the clock."""
        task = asyncio.create_task(self._call(episode, do, given, clock))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return await asyncio.shield(task)

    def forget(self, episode: int) -> None:
        """Drop the episode's environment, after the calls that are under way."""

        def drop(_: object = None) -> None:
            self._say(next(self._numbers), {"episode": episode, "do": "drop", "given": None})

        under_way = [task for task in self._calls if not task.done()]
        if under_way:
            asyncio.gather(*under_way, return_exceptions=True).add_done_callback(drop)
        else:
            drop()

    async def _call(self, episode: int, do: Call, given: Any, clock: Clock) -> Answer | NoAnswer:
        async with self._free:
            return await self._ask({"episode": episode, "do": do, "given": given}, clock)

    async def _ask(self, request: dict[str, Any], clock: Clock) -> Answer | NoAnswer:
        if not self.alive:
            return NoAnswer("none")
        number = next(self._numbers)
        answer = self._pending[number] = asyncio.get_running_loop().create_future()
        clock.begin(lambda: self._end_late(number))
        self._say(number, request)
        try:
            return await answer
        finally:
            clock.end()
            del self._pending[number]

    def _say(self, number: int, request: dict[str, Any]) -> None:
        self.send(msgspec.json.encode(request | {"call": number}) + b"\n")

    # ----------------------------------------------------------------------------------------- called by the event loop

    def data_received(self, data: bytes) -> None:
        """Handled here, not in a task: an event loop that was blocked then handles answers before time-outs."""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        if len(self._unfinished) > MAX_ANSWER_BYTES:
            self.kill("wrote to the socket that isn't its own")
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            answer = msgspec.json.decode(line, type=Answer)
        except msgspec.DecodeError:
            self.kill("wrote to the socket that isn't its own")
            return
        pending = self._pending.get(answer.call)
        if pending is not None and not pending.done():
            pending.set_result(answer)

    def release(self) -> None:
        for number, pending in self._pending.items():
            if not pending.done():
                others = "died" if self._late is None else "none"
                pending.set_result(NoAnswer("slow" if number == self._late else others))

    def _end_late(self, number: int) -> None:
        if not self._pending[number].done():
            self._late = number
            self.kill("took too long over an episode")
