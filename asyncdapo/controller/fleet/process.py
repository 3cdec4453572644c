"""The processes of a run on Ray: room for them, calls to them, and what a death means.

Every Ray call goes through `Process._answer`, the one place where Ray's errors become ours: an error of ours keeps its
kind and gains the name of its process, a death is `ProcessDied`, a defect carries the traceback of its process as its
cause. A `Process` outlives its Ray actor: started again, it is the same process in its next life.

Does not own: when a process is started again (`fleet`), what the commands do (`controller/roles`).
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.placement import Placement
from asyncdapo.controller.process.ray_servers import RayDied, close_own, start_own
from asyncdapo.controller.process.reaper import adopt_orphans
from asyncdapo.controller.process.roster import Entry, is_running
from asyncdapo.controller.roles.actors import Actor
from asyncdapo.controller.roles.base import ProcessBase, ProcessSpec
from asyncdapo.errors import RunError, UserError

P_co = TypeVar("P_co", bound=ProcessBase, covariant=True)
P = TypeVar("P", bound=ProcessBase)
Params = ParamSpec("Params")
R = TypeVar("R")
Pick = Callable[[P], Callable[Params, Coroutine[Any, Any, R]]]
"""Picks a method of what runs in a process."""

CPUS_PER_PROCESS = 0.1
"""Asked of Ray: small, so that every process is placed even on one core. Threads are what the config says."""

MAX_CONCURRENCY = 64
"""Ray calls that one process serves at a time: commands, besides its `serve`."""

CLUSTER_ANSWERS_S = 20.0
"""Within which a cluster that is to be joined says that it is there."""

CAUSE_GRACE_S = 2.0
"""Time for a death to become known, when what failed first may be a call to the process that died."""


class ProcessDied(RunError):  # noqa: N818 - what happened to it, not a failure of ours
    """A process ended without saying why: killed, out of memory, crashed in native code."""

    def __init__(self, name: str, how: str) -> None:
        super().__init__(f"{name}: the process died: {how}")
        self.name = name


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connected to `controller.ray_address`, or to a Ray of our own on this machine; every process ends with it. A Ray
    that died is left as it is, with the directory of its logs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = config.controller.ray_address
    if address:
        _check_cluster(address)
    with ExitStack() as end:
        end.callback(ray.shutdown)
        adopt_orphans(True)
        with _signals_held():
            if address:
                ray.init(address=address, **quiet)
            else:
                end.callback(close_own, start_own(**quiet))
        adopt_orphans(False)
        end.callback(adopt_orphans, True)
        try:
            yield
        except RayDied:
            end.pop_all()
            atexit.register(os._exit, 1)  # before Ray's own end, which would wait for its dead
            raise


def _check_cluster(address: str) -> None:
    """Whether a cluster answers. `ray.init` would try for minutes, and print as long, so a process asks that can be
    ended."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        asked = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=CLUSTER_ANSWERS_S
        )
    except subprocess.TimeoutExpired:
        said = f"nothing within {CLUSTER_ANSWERS_S:g} s"
    else:
        if asked.returncode == 0:
            return
        last = (asked.stdout.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        said = textwrap.shorten(last, 160, placeholder=" …")
    fix = "`ray start --head` first, or leave controller.ray_address out"
    raise UserError(f"controller.ray_address: no Ray cluster answers at {address} ({fix}; Ray says: {said})")


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM count when the body is done: a Ray that is interrupted while it starts may crash. The second
    one doesn't wait. Afterwards the handlers from before are back, not those of Ray."""
    received: list[int] = []

    def hold(sent: int, frame: object) -> None:
        received.append(sent)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {sent: signal.signal(sent, hold) for sent in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sent, handler in before.items():
            signal.signal(sent, handler)
    if received:
        raise KeyboardInterrupt


def gpus_of_nodes() -> list[int]:
    """GPUs of each node of the cluster, those in use included."""
    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]


async def reserve(placement: Placement, timeout_s: float) -> PlacementGroup:
    """Room for all of it. Raises RunError that names what was asked and what there is."""
    bundles = [
        {"CPU": CPUS_PER_PROCESS * len(bundle.processes)} | ({"GPU": bundle.num_gpus} if bundle.num_gpus else {})
        for bundle in placement.bundles
    ]
    room = placement_group(bundles, strategy="PACK")
    if not await asyncio.to_thread(room.wait, timeout_s):
        asked = Counter()
        for bundle in bundles:
            asked.update(bundle)
        raise RunError(
            f"no room on Ray within controller.place_timeout_s ({timeout_s:g} s): {placement.num_processes} processes "
            f"ask for {_amounts(asked)}, there are {_amounts(ray.cluster_resources())}, "
            f"of which {_amounts(ray.available_resources())} are free"
        )
    return room


class Process(Generic[P_co]):
    """A process of the run, by its name in logs and errors, through all its lives. `P_co` is what runs in it: a command
    is a method of that class, which a lambda picks: `await replay.call(lambda replay: replay.roll_back, step, reason)`.
    The lambda travels to the process, so it may not use anything but its own argument."""

    def __init__(self, name: str, create: Callable[[], Any]) -> None:
        """`create` starts a Ray actor and returns its handle; its constructor runs in the background."""
        self.name = name
        self.up = asyncio.Event()
        """Set while it is started and not known to be dead."""
        self.life = 0
        self.entry: Entry | None = None
        """Who it is in this life; None until it says so."""
        self.since = math.nan
        """Start of this life, `time.monotonic`."""
        self._create, self._actor = create, None

    @classmethod
    def placed(
        cls, actor: type[Actor[P_co]], spec: ProcessSpec, *, room: PlacementGroup, placement: Placement, threads: int
    ) -> Process[P_co]:
        """A process that lives in its bundle of the placement, for which `room` was reserved."""
        index = placement.index(spec.name)
        options = {
            "num_cpus": CPUS_PER_PROCESS,
            "num_gpus": placement.bundles[index].share,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=index),
            "max_concurrency": MAX_CONCURRENCY,
            "runtime_env": {
                "env_vars": {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            },
        }
        return cls(spec.name, lambda: ray.remote(actor).options(**options).remote(spec))

    def spawn(self) -> None:
        """Begin its next life. It is `up` when its owner says so."""
        self.end()
        self.life += 1
        self.since = time.monotonic()
        self._actor = self._create()

    def end(self) -> None:
        """Kill what is left of this life. A stopped process doesn't answer Ray, so it is killed by its pid,
        too."""
        self.up.clear()
        if self.entry is not None and is_running(self.entry):
            with suppress(ProcessLookupError):
                os.kill(self.entry.pid, signal.SIGKILL)
        self.entry = None
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

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
            raise ProcessDied(self.name, _reason(error)) from None
        except RayError as error:
            raise RunError(f"{self.name}: {type(error).__name__}") from error

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
        self._one_ended = asyncio.Event()

    def add(self, name: str, work: Coroutine[Any, Any, Any]) -> None:
        """Watch work that should not end, from now on."""
        task = asyncio.ensure_future(work)
        self._tasks[task] = name
        task.add_done_callback(lambda _: self._one_ended.set())

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

    def _raise_if_one_ended(self) -> None:
        for task, name in self._tasks.items():
            if task.done():
                task.result()
                raise RunError(f"{name} ended before the run did")


def _reason(error: RayActorError) -> str:
    """What Ray's report says of the way in which the process ended, without its advice."""
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes| There are some potential root|$)", str(error))
    if detail:
        return detail[1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "killed" in line.lower()), lines[0])


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"
