"""Finds room for the processes of a run on Ray, starts them, calls them, watches all of them.

Every Ray call goes through `Process.call`, the one place where Ray's errors become ours: an error of ours keeps its
kind and gains the name of its process, a death says so, a defect carries the traceback of its process as its cause.

Every process and every background task of the controller is in one watched set (`Watch`). The first that ends, with an
error or without, ends the run: an early clean exit is an error too, since each of them should outlive the training.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from asyncdapo.config import Config
from asyncdapo.errors import RunError, UserError

CPUS_PER_PROCESS = 0.1
"""Asked of Ray: small, so that every process is placed even on one core. Threads are what the config says."""

OBJECT_STORE_BYTES = 100 << 20
"""Ray's shared memory. Commands are small; neither rollouts nor weights go through it."""

MAX_CONCURRENCY = 64
"""Ray calls that one process serves at a time: commands, besides its `serve`."""

CAUSE_GRACE_S = 2.0
"""Time for a death to become known, when what failed first may be a call to the process that died."""


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connected to `controller.ray_address`, or to a Ray of our own on this machine; every process ends with it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.controller.ray_address:
        ray.init(address=config.controller.ray_address, **quiet)
    else:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def gpu_shares(config: Config, num_gpus: float) -> list[float]:
    """GPUs of the learner and of each rollout worker: one each where there are enough. Else as many processes as need
    be share a GPU in equal parts; a part never spans two GPUs."""
    wanting = [config.learner.device != "cpu"] + [config.rollout.device != "cpu"] * config.rollout.num_workers
    if not num_gpus:
        return [0.0] * len(wanting)
    share = 1 / math.ceil(max(1, sum(wanting)) / num_gpus)
    return [share if wants else 0.0 for wants in wanting]


async def reserve(num_gpus: Sequence[float], timeout_s: float) -> PlacementGroup:
    """Room for one process per entry of `num_gpus`. Raises RunError that names what was asked and what there is."""
    bundles = [{"CPU": CPUS_PER_PROCESS} | ({"GPU": gpus} if gpus else {}) for gpus in num_gpus]
    room = placement_group(bundles, strategy="PACK")
    if not await asyncio.to_thread(room.wait, timeout_s):
        asked = Counter()
        for bundle in bundles:
            asked.update(bundle)
        raise RunError(
            f"no room on Ray within controller.place_timeout_s ({timeout_s:g} s): {len(bundles)} processes ask for "
            f"{_amounts(asked)}, there are {_amounts(ray.cluster_resources())}, "
            f"of which {_amounts(ray.available_resources())} are free"
        )
    return room


@dataclass(frozen=True)
class Process:
    """A Ray actor of the run, by its name in logs and errors."""

    name: str
    actor: Any

    @classmethod
    def start(cls, actor: type, name: str, *args: Any, room: PlacementGroup, place: int, threads: int) -> Process:
        """Start it in place number `place` of the reserved room. Its constructor runs in the background."""
        bundle = room.bundle_specs[place]
        options = {
            "num_cpus": bundle["CPU"],
            "num_gpus": bundle.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=place),
            "max_concurrency": MAX_CONCURRENCY,
            "runtime_env": {
                "env_vars": {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            },
        }
        return cls(name, ray.remote(actor).options(**options).remote(name, *args))

    async def call(self, command: str, *args: Any) -> Any:
        """What the process answers. Raises UserError or RunError that names the process."""
        try:
            return await getattr(self.actor, command).remote(*args)
        except RayTaskError as error:
            raise self._translated(error) from (None if isinstance(error.cause, RunError | UserError) else error)
        except RayActorError as error:
            raise RunError(f"{self.name}: the process died: {_reason(error)}") from None
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
    """The one set of everything that must stay alive while the run goes on."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], str] = {}

    def add(self, name: str, work: Coroutine[Any, Any, Any]) -> None:
        """Watch work that should not end."""
        self._tasks[asyncio.ensure_future(work)] = name

    async def guard(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work` to its end, unless a watched task ends before; then `work` is cancelled and the cause raised."""
        main = asyncio.ensure_future(work)
        try:
            await asyncio.wait([main, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            if main.done() and main.exception() is not None:
                await asyncio.wait(self._tasks, timeout=CAUSE_GRACE_S, return_when=asyncio.FIRST_COMPLETED)
            self._raise_if_one_ended()
            return await main
        finally:
            everything = [main, *self._tasks]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)

    def _raise_if_one_ended(self) -> None:
        for task, name in self._tasks.items():
            if task.done():
                task.result()
                raise RunError(f"{name} ended before the run did")


def _reason(error: RayActorError) -> str:
    """The line of Ray's report that says how the process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "exit" in line.lower() or "killed" in line.lower()), lines[0])
    return said.partition(" There are some potential root causes")[0]


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"
