"""Main of a host process: `PYTHON host_main.py PID`. PID is the worker's process. Standard library only, and nothing of
this package: the interpreter may be another virtual environment's.

    worker ──{"name", "import_path", "concurrency", "max_chars"}──▶ host ──{"call": 0, "problem"?}──▶ worker
    worker ──{"call", "episode", "do": "reset" | "step" | "end" | "drop", "given"}──▶ host
           ◀──{"call", "observation", "reward", "metrics", "num_chars"}──  or {"call", "raised"}, {"call", "broke"}

In: JSON lines on standard input, which is a socket. Out: an answer to each call, on the same socket, in the order in
which the environments answer. The environment is the user's code and may do anything. So standard input becomes
/dev/null, its output goes to the worker's log, and processes that it forks don't inherit the socket. The process ends
when the worker closes the socket; on Linux it also dies with the worker. Does not own: time-outs, limits, retries (the
worker).
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import importlib
import importlib.util
import inspect
import json
import math
import os
import reprlib
import signal
import socket
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
MAX_REQUEST_BYTES = 1 << 26
MAX_PROBLEM_CHARS = 1000
MAX_METRICS = 100

Answer = dict[str, Any]


class BrokenContractError(Exception):
    """The environment returned what the contract doesn't allow."""


class Episodes:
    """The environments of the episodes under way."""

    def __init__(self, make: Any, concurrency: int, max_chars: int) -> None:
        self._make, self._max_chars = make, max_chars
        self._threads = ThreadPoolExecutor(concurrency)
        self._environments: dict[int, Any] = {}

    async def answer(self, request: dict[str, Any]) -> Answer:
        """What the environment says to a request. Never raises."""
        try:
            return await self._do(request["episode"], request["do"], request["given"])
        except BrokenContractError as error:
            return {"broke": f"{request['do']}: {error}"}
        except BaseException as error:  # noqa: BLE001 - whatever it raises fails only its episode
            return {"raised": f"{request['do']}: {describe(error)}"}

    async def _do(self, episode: int, do: str, given: Any) -> Answer:
        if do == "drop":
            self._environments.pop(episode, None)
            return {}
        if do == "end":
            metrics = getattr(self._environments[episode], "metrics", None)
            return {"metrics": read_metrics(await self._call(metrics) if metrics else {})}
        if do == "reset":
            environment = self._environments[episode] = await self._call(self._make)
            return self._observation(await self._call(environment.reset, given))
        said = await self._call(self._environments[episode].step, given)
        if not isinstance(said, tuple):
            return self._observation(said)
        if len(said) != 2:
            raise BrokenContractError(f"returned a tuple of {len(said)}; (observation, reward) has two")
        return self._observation(said[0]) | {"reward": finite("a reward", said[1])}

    async def _call(self, function: Any, *given: Any) -> Any:
        """Async functions run in the event loop, others in a thread."""
        if inspect.iscoroutinefunction(function):
            return await function(*given)

        def call() -> tuple[Any, BaseException | None]:
            try:
                return function(*given), None
            except BaseException as error:  # noqa: BLE001 - as a value: a future can't carry a StopIteration
                return None, error

        returned, error = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        if error is not None:
            raise error
        return await returned if inspect.isawaitable(returned) else returned

    def _observation(self, said: Any) -> Answer:
        """Too long a text is not sent; its length is."""
        if said is None:
            return {"observation": None}
        if not isinstance(said, str):
            check_messages(said)
        num_chars = len(said) if isinstance(said, str) else sum(len(message["content"]) for message in said)
        if num_chars > self._max_chars:
            return {"observation": None, "num_chars": num_chars}
        return {"observation": said}


def check_messages(said: Any) -> None:
    """Raises BrokenContractError for what is no list of messages."""
    messages = isinstance(said, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() and isinstance(message["content"], str)
        for message in said
    )
    if not messages or not said:
        shown = reprlib.repr(said)
        raise BrokenContractError(
            f"an observation is a text, a list of messages with role and content, or None: {shown}"
        )


def finite(what: str, value: Any) -> float:
    """The value as a number. Raises BrokenContractError if it isn't a finite one."""
    if isinstance(value, str | bytes):
        raise BrokenContractError(f"{what} is a finite number, got {reprlib.repr(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BrokenContractError(f"{what} is a finite number, got {reprlib.repr(value)}")
    return number


def read_metrics(said: Any) -> dict[str, float]:
    """Raises BrokenContractError for what is no dict of finite numbers."""
    if not isinstance(said, dict) or len(said) > MAX_METRICS or not all(isinstance(name, str) for name in said):
        raise BrokenContractError(
            f"metrics are a dict of at most {MAX_METRICS} numbers by name, got {reprlib.repr(said)}"
        )
    return {name: finite(f"metric {name!r}", value) for name, value in said.items()}


def describe(error: BaseException) -> str:
    """Type and message of an error in one line, and where it was raised."""
    report = traceback.TracebackException.from_exception(error)
    problem = " ".join(f"{type(error).__name__}: {report}"[:MAX_PROBLEM_CHARS].split())
    last = report.stack[-1]
    return f"{problem} (in {last.name}, {last.filename}:{last.lineno})"


def load(name: str) -> Any:
    """The class that `environment.path` names."""
    where, _, attribute = name.rpartition(":")
    if not where.endswith(".py"):
        return getattr(importlib.import_module(where), attribute)
    path = Path(where)
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"asyncdapo_environment_{path.stem}", path)
    assert spec is not None, "the name ends in .py"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there for the module of a class
    spec.loader.exec_module(module)
    return getattr(module, attribute)


async def serve(sock: socket.socket) -> None:
    """Answer until the worker closes the socket."""
    reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_REQUEST_BYTES)

    def tell(call: int, answer: Answer) -> None:
        line = json.dumps({"call": call} | answer, ensure_ascii=False)
        writer.write(line.encode(errors="replace") + b"\n")  # half a surrogate pair becomes a question mark

    setup = json.loads(await reader.readline())
    sys.path[:0] = [path for path in setup["import_path"] if path not in sys.path]
    try:
        make = load(setup["name"])
    except BaseException as error:  # noqa: BLE001 - the user's module runs its own code when it is imported
        tell(0, {"raised": describe(error)})
        await writer.drain()
        return
    episodes, answering = Episodes(make, setup["concurrency"], setup["max_chars"]), set()
    tell(0, {})

    async def handle(request: dict[str, Any]) -> None:
        tell(request["call"], await episodes.answer(request))

    while line := await reader.readline():
        task = asyncio.create_task(handle(json.loads(line)))
        answering.add(task)
        task.add_done_callback(answering.discard)


def main(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the worker handles Ctrl-C
    faulthandler.enable()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which started this host, is gone")
    sock = socket.socket(fileno=os.dup(0))
    os.register_at_fork(after_in_child=sock.close)
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.close(devnull)
    asyncio.run(serve(sock))
    os._exit(0)  # threads may still be in the user's code


if __name__ == "__main__":
    main(int(sys.argv[1]))
