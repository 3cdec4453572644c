"""Receive buffer: one rank of the weight group. It receives in a thread of its own while the engine generates.

    make_room ──▶ thread: memory for the stream              settled
    join ──▶ thread: find the others                         settled
    receive ──▶ thread: the stream into that memory          settled ──▶ take

In: the learner's stream. Out: the tensors of a version that is complete at every rank. One operation runs at a time,
and no method waits for it: `settled` says whether the last one is over. An operation that still runs when another group
is joined ends as soon as the learner leaves the old group, or at its deadline. Invariant: `take` returns only the
version that it was asked for, and only after every rank confirmed the checksum.

The stream is stored on the engine's device if it has room to spare; loading is then a copy on the device. Otherwise it
is stored in host memory, which is pinned if as much again stays free, since a device copies faster from pinned memory.
Pinning takes a second for every few GiB, so `make_room` is a separate step outside the deadline of a transfer.

Shape: U bytes (uint8).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import psutil
import torch

from asyncdapo.errors import WeightsError
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.process_group import numbered
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receiver import WeightReceiver

ROOM_FACTOR = 1.2
ROOM_BYTES = 1 << 30
"""A GPU has room for the stream if `ROOM_FACTOR` times its length plus `ROOM_BYTES` are free."""
PIN_FACTOR = 2.0
"""Host memory is pinned only if this many times the wanted amount is free, since nothing else can use it then."""
GIB = 1 << 30

log = logging.getLogger("weights")


class ReceiveBuffer:
    """This process's memory for versions on their way to an engine on `device`. `num_alike`: the engine's processes on
    this machine; each needs as much memory."""

    def __init__(self, device: torch.device, num_alike: int = 1) -> None:
        self._device, self._num_alike = numbered(device), num_alike
        self._thread = ThreadPoolExecutor(1, "weights", self._prepare_thread)
        self._stream: AbstractContextManager = nullcontext()
        """The thread works in it: on a GPU, a CUDA stream of its own."""
        self._under_way: Future[None] | None = None
        self._group: WeightGroup | None = None
        self._receiver: WeightReceiver | None = None
        """None until this rank has joined a group."""
        self._memory_U = torch.empty(0, dtype=torch.uint8)
        self._staged: tuple[int, dict[str, torch.Tensor]] | None = None

    def make_room(self, manifest: Manifest) -> Future[None]:
        """Leave the group, and begin to allocate memory for this stream unless it is there. Fails with WeightsError
        if the machine has too little."""
        self._leave()
        return self._begin(partial(self._make_room, manifest.offsets[-1]))

    def join(
        self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest, timeout_s: float
    ) -> Future[None]:
        """Leave the old group, and begin to join the one at `address`. Fails with WeightsError."""
        self._leave()
        return self._begin(partial(self._join, address, rank, world_size, backend, manifest, timeout_s))

    def receive(self, version: int, branch: int) -> Future[None]:
        """Begin to receive this version. Fails with WeightsError; the buffer then holds no version."""
        self._staged = None
        return self._begin(partial(self._receive, version, branch))

    def settled(self) -> bool:
        """Whether the last operation is over. Raises its error if it failed."""
        if self._under_way is None or not self._under_way.done():
            return self._under_way is None
        self._under_way.result()
        return True

    def take(self, version: int) -> dict[str, torch.Tensor]:
        """The tensors of this version by name, valid until the next `receive` or `join`. Raises WeightsError if the
        buffer holds another version or none."""
        if self._staged is None or self._staged[0] != version:
            there = f"version {self._staged[0]} is" if self._staged else "nothing is"
            raise WeightsError(f"version {version} has not arrived here: {there} staged")
        return self._staged[1]

    @property
    def memory(self) -> str:
        """Size and kind of the buffer's memory, for the log."""
        kind = "memory of the GPU" if self._memory_U.is_cuda else "memory of the host"
        return f"{len(self._memory_U) / 2**20:.1f} MiB in {kind}"

    def close(self) -> None:
        """Leave the group. A running operation fails."""
        self._leave()
        self._thread.shutdown(wait=False)

    def _leave(self) -> None:
        self._staged = None
        if self._group:
            self._group.close()

    def _begin(self, work: Callable[[], None]) -> Future[None]:
        self._under_way = self._thread.submit(work)
        return self._under_way

    # ------------------------------------------------------------------------------------------------- in the thread

    def _prepare_thread(self) -> None:
        """Give the thread a CUDA stream of its own: its copies must not wait for the engine's kernels."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            self._stream = torch.cuda.stream(torch.cuda.Stream(self._device))

    def _join(
        self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest, timeout_s: float
    ) -> None:
        deadline = Deadline(timeout_s)
        self._make_room(manifest.offsets[-1])
        with self._stream:
            self._group = WeightGroup(address, rank, world_size, backend, timeout_s, self._device)
            self._group.connect(deadline)
            self._receiver = WeightReceiver(self._group, manifest, self._memory_U)

    def _receive(self, version: int, branch: int) -> None:
        assert self._receiver is not None, "a version before a group"
        assert self._receiver is not None, "`join` comes first"
        with self._stream:
            tensors = self._receiver.receive(version, branch=branch)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        self._staged = version, tensors

    def _make_room(self, num_bytes: int) -> None:
        if len(self._memory_U) == num_bytes:
            return
        on_gpu = self._device.type == "cuda"
        self._memory_U = torch.empty(0, dtype=torch.uint8)  # the old memory counts as free
        if on_gpu and torch.cuda.mem_get_info(self._device)[0] > ROOM_FACTOR * num_bytes + ROOM_BYTES:
            with self._stream:
                self._memory_U = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            return
        wanted, free = self._num_alike * num_bytes, psutil.virtual_memory().available
        if wanted > free:
            raise WeightsError(
                f"new weights take {num_bytes / GIB:.3g} GiB of the machine's memory in each of {self._num_alike} "
                f"processes of an engine, and {free / GIB:.3g} are free; with a smaller rollout.memory_fraction the "
                "GPU has room for them"
            )
        self._memory_U = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu and PIN_FACTOR * wanted <= free)
