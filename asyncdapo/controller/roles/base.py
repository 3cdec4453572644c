"""What the processes of a run share: who they are, what they wait for, and one thread for blocking work.

Blocking work (a train step, a broadcast) runs in a thread of its own, so that every process answers while it computes.
Rollouts travel by ZeroMQ and weights by a process group of their own; a Ray call carries neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from asyncdapo.accounting.spans import SpanFile
from asyncdapo.config.config import Config
from asyncdapo.controller.process.health import Health
from asyncdapo.controller.process.roster import Entry, process_name, this_process
from asyncdapo.controller.process.stacks import stacks
from asyncdapo.controller.process.waits import Waits
from asyncdapo.transport.keys import RunKeys

T = TypeVar("T")


def log_path(config: Config, name: str) -> Path:
    """The log of a process."""
    return Path(config.run.dir) / "logs" / f"{name}.log"


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """Who a process is, and what every process knows of its run."""

    role: str
    index: int = 0
    """Counts the processes of this role."""
    config: Config
    keys: RunKeys

    @property
    def name(self) -> str:
        """As in logs and errors."""
        return process_name(self.role, self.index)

    @property
    def log_path(self) -> Path:
        """The process's own log."""
        return log_path(self.config, self.name)

    def entry(self) -> Entry:
        """The calling process, which is this one."""
        return this_process(self.role, self.index)

    def host(self) -> str:
        """Where others reach the calling process: loopback on a Ray of our own, else this node's address."""
        return ray.util.get_node_ip_address() if self.config.controller.ray_address else "127.0.0.1"


class ProcessBase:
    """A process of the run that is up. Each role has a `start` that returns it whole."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec, self.config = spec, spec.config
        self.waits = Waits(spec.name)
        self.span_file = SpanFile(Path(spec.config.run.dir), spec.name)
        """What it did when, written at the end of each train step."""
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=spec.name)

    async def blocking(self, work: Callable[..., T], *args: Any) -> T:
        """Run blocking work in this process's one thread for it: never two at a time."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *args)

    async def serve(self) -> None:
        """Do the process's work for as long as it lives; raises what ends it."""
        raise NotImplementedError

    async def health(self) -> Health:
        """What it waits for, and how far it is."""
        raise NotImplementedError

    async def stacks(self) -> str:
        """Where all its threads and tasks stand."""
        return stacks()
