"""Staging: one rank's end of the weight group, which receives in a thread of its own while something else computes.

    make_room ──▶ thread: memory for the stream              settled
    join ──▶ thread: find the others                         settled
    receive ──▶ thread: the stream into that memory          settled ──▶ take

In: what the learner sends. Out: the tensors of a version that arrived whole, at every end. One thing at a time, and
nothing here waits for it: `settled` says whether the last one is over. What is under way when another group is to be
joined ends as soon as the learner has left the old one, at its deadline at the latest. Invariant: `take` gives a
version only after its checksum was right at every end, and never another one than it was asked for.

The memory for the stream is the engine's device where that has room to spare, so that loading is a copy on the device;
else memory of the host, pinned where that leaves the host as much again, since a device copies faster from there.
Pinning takes a second for every few GiB, so room is made in a step of its own, outside of a transfer's deadline.

Shape: U bytes (uint8).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch

from asyncdapo.errors import WeightsError
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.process_group import numbered
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.layout import Manifest
from asyncdapo.weights.receiver import WeightReceiver

ROOM_FACTOR = 1.2
ROOM_BYTES = 1 << 30
"""A GPU has room for the stream when so many times its length, and this besides, are free."""
PIN_FACTOR = 2.0
"""Memory of the host is pinned where so many times of what is asked for is free: nothing else can have it then."""
GIB = 1 << 30

log = logging.getLogger("weights")


class Staging:
    """Memory of this process for versions on their way to an engine on `device`. `num_alike`: processes of the engine
    on this machine, each of which has as much."""

    def __init__(self, device: torch.device, num_alike: int = 1) -> None:
        self._device, self._num_alike = numbered(device), num_alike
        self._thread = ThreadPoolExecutor(1, "weights", self._prepare_thread)
        self._under_way: Future[None] | None = None
        self._group: WeightGroup | None = None
        self._memory_U = torch.empty(0, dtype=torch.uint8)
        self._staged: tuple[int, dict[str, torch.Tensor]] | None = None

    def make_room(self, manifest: Manifest) -> Future[None]:
        """Leave the group, and begin to make room for this stream unless there is. Fails with WeightsError where the
        machine has none."""
        self._leave()
        return self._begin(partial(self._make_room, manifest.offsets[-1]))

    def join(
        self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest, timeout_s: float
    ) -> Future[None]:
        """Begin to join the group at `address`, and leave the one before. Fails with WeightsError."""
        self._leave()
        return self._begin(partial(self._join, address, rank, world_size, backend, manifest, timeout_s))

    def receive(self, version: int, branch: int) -> Future[None]:
        """Begin to receive this version. Fails with WeightsError, and nothing is staged then."""
        self._staged = None
        return self._begin(partial(self._receive, version, branch))

    def settled(self) -> bool:
        """Whether what was begun last is over. Raises what it failed with."""
        if self._under_way is None or not self._under_way.done():
            return self._under_way is None
        self._under_way.result()
        return True

    def take(self, version: int) -> dict[str, torch.Tensor]:
        """The tensors of this version by their names, good until the next `receive` or `join`. Raises WeightsError when
        another version is staged, or none."""
        if self._staged is None or self._staged[0] != version:
            there = f"version {self._staged[0]} is" if self._staged else "nothing is"
            raise WeightsError(f"version {version} has not arrived here: {there} staged")
        return self._staged[1]

    @property
    def memory(self) -> str:
        """Where the stream lands, for the log."""
        kind = "memory of the GPU" if self._memory_U.is_cuda else "memory of the host"
        return f"{len(self._memory_U) / 2**20:.1f} MiB in {kind}"

    def close(self) -> None:
        """Leave the group; what is under way fails."""
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
        """Copies between GPU and host must not wait for what the engine computes."""
        self._stream: AbstractContextManager = nullcontext()
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
        wanted, free = self._num_alike * num_bytes, free_host_bytes()
        if wanted > free:
            raise WeightsError(
                f"new weights take {num_bytes / GIB:.3g} GiB of the machine's memory in each of {self._num_alike} "
                f"processes of an engine, and {free / GIB:.3g} are free; with a smaller rollout.memory_fraction the "
                "GPU has room for them"
            )
        self._memory_U = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu and PIN_FACTOR * wanted <= free)


def free_host_bytes() -> int:
    """What this machine could still give to processes."""
    [line] = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(line.split()[1]) << 10
