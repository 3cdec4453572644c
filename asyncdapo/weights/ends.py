"""Ends: what a rollout worker is in the group of the weights, wherever its engine keeps its model.

    LocalEnd     the engine computes in this process: one rank, and `receive` returns the tensors
    EngineEnd    the engine has processes of its own (`vllm_worker.WorkerEnd`): a rank each, and the tensors stay there

In: the learner's address and what it sends. Out: a version that has arrived whole at every end of the group, which the
engine may then load. Generation goes on meanwhile; only NCCL among several GPUs of one engine pauses it, since its two
communicators could wait for each other on one device. What goes wrong is a WeightsError, and the engine has lost
nothing. Does not own: loading, and what becomes of a worker that can't be reached.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Protocol

import msgspec
import torch

from asyncdapo.errors import EngineError, RunError, WeightsError
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.process_group import device_name
from asyncdapo.weights.layout import Manifest
from asyncdapo.weights.staging import Staging

TRANSFER = "asyncdapo"
"""The name under which `vllm_worker` registers with vLLM."""
WORKER_END = "asyncdapo.weights.vllm_worker.WorkerEnd"
"""What vLLM mixes into its workers."""

FIRST_POLL_S, LONGEST_POLL_S = 0.001, 0.02
"""Between two questions to an engine's processes; each takes them a moment between two tokens."""

log = logging.getLogger("weights")


class End(Protocol):
    """A worker's ranks in the group of the weights, consecutive ones."""

    async def devices(self) -> list[str]:
        """The device of each rank, by its name."""

    async def make_room(self, manifest: Manifest) -> None:
        """Leave the group, and have memory for these tensors; however long that takes."""

    async def join(self, address: str, first_rank: int, world_size: int, backend: Backend, manifest: Manifest) -> None:
        """Join the group at `address` and leave the one before."""

    async def receive(self, version: int, branch: int) -> Any:
        """Receive this version. Returns what the engine's `load_weights` wants."""

    def close(self) -> None:
        """Leave the group."""


class LocalEnd:
    """The end of an engine in this process, whose device is known once it has started."""

    def __init__(self, device: Callable[[], torch.device], timeout_s: float) -> None:
        self._device, self._timeout_s = device, timeout_s
        self._staging: Staging | None = None

    async def devices(self) -> list[str]:
        return [device_name(self._device())]

    async def make_room(self, manifest: Manifest) -> None:
        self._staging = self._staging or Staging(self._device())
        # in a thread: what NCCL does on the GPU is waited for where a group is left
        await asyncio.wrap_future(await asyncio.to_thread(self._staging.make_room, manifest))

    async def join(self, address: str, first_rank: int, world_size: int, backend: Backend, manifest: Manifest) -> None:
        self._staging = self._staging or Staging(self._device())
        join = self._staging.join
        joining = asyncio.to_thread(join, address, first_rank, world_size, backend, manifest, self._timeout_s)
        await asyncio.wrap_future(await joining)

    async def receive(self, version: int, branch: int) -> dict[str, torch.Tensor]:
        if self._staging is None:
            raise WeightsError(f"version {version} can't arrive: this worker has joined no group")
        await asyncio.wrap_future(self._staging.receive(version, branch))
        return self._staging.take(version)

    def close(self) -> None:
        if self._staging:
            self._staging.close()


class EngineEnd:
    """The ends of an engine's processes, reached by `rpc`, which calls a method of `WorkerEnd` in all of them and
    returns their answers in the order of their ranks. Inside of `paused()` nothing is generated."""

    def __init__(
        self,
        rpc: Callable[..., Awaitable[list[Any]]],
        timeout_s: float,
        paused: Callable[[], AbstractAsyncContextManager[Any]],
    ) -> None:
        self._rpc, self._timeout_s, self._paused = rpc, timeout_s, paused
        self._pauses = False
        self._memory = ""

    async def devices(self) -> list[str]:
        return await self._ask("weights_device")

    async def make_room(self, manifest: Manifest) -> None:
        await self._ask("make_weights_room", msgspec.msgpack.encode(manifest))
        await self._settled()

    async def join(self, address: str, first_rank: int, world_size: int, backend: Backend, manifest: Manifest) -> None:
        packed = msgspec.msgpack.encode(manifest)
        ranks = await self._ask("join_weights", address, first_rank, world_size, backend, packed, self._timeout_s)
        await self._settled()
        self._pauses = backend == "nccl" and len(ranks) > 1
        memory = ", ".join(await self._ask("weights_memory"))
        if memory != self._memory:
            self._memory = memory
            log.info("weights are staged: %s", memory)

    async def receive(self, version: int, branch: int) -> None:
        async with self._paused() if self._pauses else nullcontext():
            await self._ask("receive_weights", version, branch)
            await self._settled()

    def close(self) -> None:
        """The group ends with the engine's processes."""

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        """The answers of all its processes. Raises WeightsError when one has none, EngineError when the engine died."""
        try:
            return await self._rpc(method, *args)
        except EngineError:
            raise
        except RunError as error:
            raise WeightsError(str(error)) from error

    async def _settled(self) -> None:
        """Wait until what was begun is over in every process. Raises WeightsError as soon as it has failed in one."""
        poll_s = FIRST_POLL_S
        while True:
            answers = await self._ask("weights_state")
            if problems := [problem for _, problem in answers if problem]:
                raise WeightsError(problems[0])
            if all(over for over, _ in answers):
                return
            await asyncio.sleep(poll_s)
            poll_s = min(2 * poll_s, LONGEST_POLL_S)
