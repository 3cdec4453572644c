"""Receivers: a rollout worker's rank in the weight group, wherever its engine keeps the model.

    LocalReceiver     the engine computes in this process, and `receive` returns the tensors
    EngineReceiver    the engine has processes of its own, which run `vllm_worker.WorkerReceiver`; the first one
                      receives, the others map its memory, and the tensors stay there

In: the address of who sends, and its stream: the learner, or a worker that has the version. Out: a version that is
complete at every rank of the group; the engine may then load it, and a newcomer may have it from here. Generation
continues during a transfer. Every failure is a WeightsError, and the engine keeps its weights.
Does not own: loading, and what happens to a worker that can't be reached.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
import torch

from asyncdapo.errors import EngineError, RunError, WeightsError
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.shared_memory import device_name
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receive_buffer import ReceiveBuffer

TRANSFER = "asyncdapo"
"""The name under which `vllm_worker` registers with vLLM."""
WORKER_RECEIVER = "asyncdapo.weights.vllm_worker.WorkerReceiver"
"""What vLLM mixes into its workers."""

FIRST_POLL_S, LONGEST_POLL_S = 0.001, 0.02
"""Seconds between two polls of an engine's processes. A poll costs them a moment between two tokens."""

log = logging.getLogger("weights")


class Receiver(Protocol):
    """A worker's rank in the weight group."""

    async def device(self) -> str:
        """The name of its device."""
        ...

    async def make_room(self, manifest: Manifest) -> None:
        """Leave the group and allocate memory for these tensors. There is no deadline."""

    async def join(self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest) -> None:
        """Leave the old group and join the one at `address`."""

    async def receive(self, version: int, branch: int) -> Any:
        """Receive this version. Returns what the engine's `load_weights` takes."""

    async def host(self, host: str, backend: Backend) -> tuple[str, Manifest]:
        """Open a group in which to send what it holds to a newcomer. Returns its address, and what is sent."""
        ...

    async def send(self, version: int, branch: int, bucket_bytes: int) -> None:
        """Send this version there."""

    async def abandon(self) -> None:
        """Leave that group; what is being sent there fails."""

    async def leave(self) -> None:
        """Leave every group; what is being received fails, too."""

    def close(self) -> None:
        """Leave the group."""


class LocalReceiver:
    """The receiver of an engine in this process. Its device is known once the engine has started."""

    def __init__(self, device: Callable[[], torch.device], timeout_s: float) -> None:
        self._device, self._timeout_s = device, timeout_s
        self._buffer: ReceiveBuffer | None = None

    async def device(self) -> str:
        return device_name(self._device())

    async def make_room(self, manifest: Manifest) -> None:
        self._buffer = self._buffer or ReceiveBuffer(self._device())
        # in a thread: leaving a group waits for NCCL's work on the GPU
        await asyncio.wrap_future(await asyncio.to_thread(self._buffer.make_room, manifest))

    async def join(self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest) -> None:
        self._buffer = self._buffer or ReceiveBuffer(self._device())
        join = self._buffer.join
        joining = asyncio.to_thread(join, address, rank, world_size, backend, manifest, self._timeout_s)
        await asyncio.wrap_future(await joining)

    async def receive(self, version: int, branch: int) -> dict[str, torch.Tensor]:
        if self._buffer is None:
            raise WeightsError(f"version {version} can't arrive: this worker has joined no group")
        await asyncio.wrap_future(await asyncio.to_thread(self._buffer.receive, version, branch))
        return self._buffer.take(version)

    async def host(self, host: str, backend: Backend) -> tuple[str, Manifest]:
        if self._buffer is None:
            raise WeightsError("this worker has no weights to send: it has received none")
        return await asyncio.to_thread(self._buffer.host, host, backend, self._timeout_s)

    async def send(self, version: int, branch: int, bucket_bytes: int) -> None:
        if self._buffer:
            await asyncio.wrap_future(self._buffer.send(version, branch, bucket_bytes))

    async def abandon(self) -> None:
        if self._buffer:
            await asyncio.to_thread(self._buffer.abandon)

    async def leave(self) -> None:
        if self._buffer:
            await asyncio.to_thread(self._buffer.leave)

    def close(self) -> None:
        if self._buffer:
            self._buffer.close()


class EngineReceiver:
    """The receiver of an engine with processes of its own. `rpc` calls a method of `WorkerReceiver` in all of them and
    returns their answers, the first process's first."""

    def __init__(self, rpc: Callable[..., Awaitable[list[Any]]], timeout_s: float) -> None:
        self._rpc, self._timeout_s = rpc, timeout_s
        self._memory = ""

    async def device(self) -> str:
        return (await self._ask("weights_device"))[0]

    async def make_room(self, manifest: Manifest) -> None:
        await self._ask("make_weights_room", msgspec.msgpack.encode(manifest))
        await self._settled()

    async def join(self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest) -> None:
        packed = msgspec.msgpack.encode(manifest)
        await self._ask("join_weights", address, rank, world_size, backend, packed, self._timeout_s)
        await self._settled()
        (memory, handle), *others = await self._ask("weights_memory")
        if others:
            await self._ask("open_weights_memory", handle, packed)
        if memory != self._memory:
            self._memory = memory
            log.info("new weights are received into %s", memory)

    async def receive(self, version: int, branch: int) -> None:
        await self._ask("receive_weights", version, branch)
        await self._settled()

    async def host(self, host: str, backend: Backend) -> tuple[str, Manifest]:
        address, manifest = (await self._ask("host_weights", host, backend, self._timeout_s))[0]
        return address, msgspec.msgpack.decode(manifest, type=Manifest)

    async def send(self, version: int, branch: int, bucket_bytes: int) -> None:
        await self._ask("send_weights", version, branch, bucket_bytes)
        await self._settled()

    async def abandon(self) -> None:
        await self._ask("abandon_weights")

    async def leave(self) -> None:
        await self._ask("leave_weights")

    def close(self) -> None:
        """Nothing: the engine's processes leave the group when they end."""

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        """The answers of all its processes. Raises WeightsError if a call fails, EngineError if the engine died."""
        try:
            return await self._rpc(method, *args)
        except EngineError:
            raise
        except RunError as error:
            raise WeightsError(str(error)) from error

    async def _settled(self) -> None:
        """Wait until the operation is over in every process. Raises WeightsError as soon as one has failed."""
        poll_s = FIRST_POLL_S
        while True:
            answers = await self._ask("weights_state")
            if problems := [problem for _, problem in answers if problem]:
                raise WeightsError(problems[0])
            if all(over for over, _ in answers):
                return
            await asyncio.sleep(poll_s)
            poll_s = min(2 * poll_s, LONGEST_POLL_S)
