"""Starts the processes of a run on Ray, watches all of them, and stops them.

Every process and every background task of the controller is in one watched set (`Watch`). The first that ends, with an
error or without, ends the run: an early clean exit is an error too, since each of them should outlive the training.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Coroutine
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayTaskError

from asyncdapo.config import Config
from asyncdapo.errors import RunError

CPUS_PER_ACTOR = 0.1
"""Asked of Ray: small, so that every actor is placed even on one core. Threads are what the config says."""

OBJECT_STORE_BYTES = 100 << 20
"""Ray's shared memory. Commands are small; neither rollouts nor weights go through it."""

MAX_CONCURRENCY = 64
"""Ray calls one actor serves at a time: commands, besides its `serve`."""


def init_ray(config: Config) -> None:
    """Connect to `controller.ray_address`, or start a Ray of our own on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.controller.ray_address:
        ray.init(address=config.controller.ray_address, **common)
    else:
        ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **common)


def gpus_per_process(config: Config) -> float:
    """GPUs for the learner and for each rollout worker: one each where there are enough, else equal shares."""
    num_gpus = ray.cluster_resources().get("GPU", 0)
    wanting = [config.learner.device] + [config.rollout.device] * config.rollout.num_workers
    num_wanting = sum(device != "cpu" for device in wanting)
    if not num_gpus or not num_wanting:
        return 0.0
    return 1.0 if num_gpus >= num_wanting else num_gpus / num_wanting


def start_actor(cls: type, name: str, *args: Any, threads: int, num_gpus: float = 0.0) -> Any:
    """A handle of the actor; Ray places it in the background."""
    return (
        ray.remote(cls)
        .options(
            num_cpus=CPUS_PER_ACTOR,
            num_gpus=num_gpus,
            max_concurrency=MAX_CONCURRENCY,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}},
        )
        .remote(name, *args)
    )


async def placed(actor: Any, name: str, timeout_s: float) -> None:
    """Wait until the actor's process answers. Raises RunError that names what was asked and what there is."""
    try:
        await asyncio.wait_for(asyncio.wrap_future(actor.ping.remote().future()), timeout_s)
    except TimeoutError:
        raise RunError(
            f"{name} was not placed within controller.place_timeout_s ({timeout_s:g} s); "
            f"each process asks for {CPUS_PER_ACTOR} CPU, free are {ray.available_resources()}, "
            f"of {ray.cluster_resources()}"
        ) from None


class Watch:
    """The one set of everything that must stay alive while the run goes on."""

    def __init__(self) -> None:
        self.tasks: dict[asyncio.Task[Any], str] = {}

    def add(self, name: str, work: Awaitable[Any]) -> None:
        """Watch a Ray call or a coroutine that should not end."""
        self.tasks[asyncio.ensure_future(_awaited(work))] = name

    async def guard(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work` to its end. If a watched task ends first, cancel `work` and raise what ended it."""
        main = asyncio.ensure_future(work)
        try:
            await asyncio.wait([main, *self.tasks], return_when=asyncio.FIRST_COMPLETED)
            if main.done() and not main.cancelled() and main.exception() is None:
                return main.result()
            await self._settle(main)
            return main.result()
        finally:
            main.cancel()
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(main, *self.tasks, return_exceptions=True)

    async def _settle(self, main: asyncio.Task[Any]) -> None:
        """Raise the root cause. A dying process fails the calls to it as well, so watched tasks are looked at first."""
        await asyncio.wait([main, *self.tasks], timeout=CAUSE_GRACE_S, return_when=asyncio.ALL_COMPLETED)
        for task, name in self.tasks.items():
            if task.done():
                raise_cause(name, task)
        if main.done():
            raise_cause("controller", main)


CAUSE_GRACE_S = 1.0
"""Time for the task that failed first to be known, when several fail together."""


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work


def raise_cause(name: str, task: asyncio.Task[Any]) -> None:
    """Raise a RunError that names the process and carries its own traceback; or say that it ended too early."""
    error = task.exception()
    if error is None:
        raise RunError(f"{name} ended before the run did")
    if isinstance(error, RunError) and not isinstance(error, RayTaskError):
        raise error
    if isinstance(error, ActorDiedError):
        raise RunError(f"{name}: the process died ({first_line(error)})") from error
    if isinstance(error, RayTaskError) and isinstance(error.cause, RunError):
        raise RunError(f"{name}: {error.cause}") from error
    raise RunError(f"{name}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
