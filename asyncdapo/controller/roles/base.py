"""What the processes of a run share: a name, the config, one thread for blocking work, and who they are.

Blocking work (a train step, a broadcast) runs in a thread of its own, so that every process answers while it computes.
Rollouts travel by ZeroMQ and weights by a process group of their own; a Ray call carries neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ray

from asyncdapo.config.config import Config
from asyncdapo.controller.process.roster import Entry, this_process
from asyncdapo.controller.process.stacks import stacks
from asyncdapo.controller.process.waits import Waits
from asyncdapo.transport.keys import RunKeys

T = TypeVar("T")


class Member:
    """A process of the run."""

    role: str

    def __init__(self, name: str, config: Config, keys: RunKeys, index: int) -> None:
        self.name, self.config, self.keys, self.index = name, config, keys, index
        self.waits = Waits(name)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def blocking(self, work: Callable[..., T], *args: Any) -> T:
        """Run blocking work in this process's one thread for it: never two at a time."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *args)

    async def entry(self) -> Entry:
        """Who this process is."""
        return this_process(self.role, self.index)

    async def stacks(self) -> str:
        """Where all its threads and tasks stand."""
        return stacks()

    def host(self) -> str:
        """Where others reach this process: loopback on a Ray of our own, else this node's address."""
        return ray.util.get_node_ip_address() if self.config.controller.ray_address else "127.0.0.1"
