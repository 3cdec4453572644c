"""Receive buffer: where a version waits, whole, until an engine loads it. One process of the engine receives it, in a
thread of its own while the engine generates.

    make_room ──▶ thread: memory for the stream              settled
    join ──▶ thread: find the others                         settled
    receive ──▶ thread: the stream into that memory          settled ──▶ take
    open: another process of the engine maps that memory                 take
    host, send ──▶ thread: that memory to a newcomer         settled

In: the learner's stream, or that of another worker's buffer. Out: the tensors of a version that is complete at every
rank. One operation runs at a time, and no method waits for it: `settled` says whether the last one is over. An
operation that still runs when another group is joined ends as soon as rank 0 leaves the old group, or at its deadline;
`send` ends at once when another operation begins. Invariant: `take` returns only the version that it was asked for, and
only after every rank confirmed the checksum.

The stream is stored on the engine's device if it has room to spare; loading is then a copy on the device. Otherwise it
is stored in host memory, which is pinned if as much again stays free, since a device copies faster from pinned memory.
Pinning takes a second for every few GiB, so `make_room` is a separate step outside the deadline of a transfer. An
engine of several processes has the stream in host memory that all of them map, so that it is there once.

Shape: U bytes (uint8).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial

import psutil
import torch

from asyncdapo.errors import WeightsError
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.shared_memory import Block, make_block, numbered, open_block
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.manifest import ALIGN_BYTES, Manifest
from asyncdapo.weights.receiver import WeightReceiver, tensors_in
from asyncdapo.weights.sender import WeightSender

ROOM_FACTOR = 1.2
ROOM_BYTES = 1 << 30
"""A GPU has room for the stream if `ROOM_FACTOR` times its length plus `ROOM_BYTES` are free."""
PIN_FACTOR = 2.0
"""Host memory is pinned only if this many times the wanted amount is free, since nothing else can use it then."""
GIB = 1 << 30
HOST = torch.device("cpu")
NOTHING = -1
"""In place of a version: there is none, or a part of one."""

log = logging.getLogger("weights")


class ReceiveBuffer:
    """Memory for versions on their way to an engine on `device`. `shared`: the engine has several processes; one
    receives, the others `open` its memory."""

    def __init__(self, device: torch.device, *, shared: bool = False) -> None:
        self._device, self._shared = numbered(device), shared
        self._thread = ThreadPoolExecutor(1, "weights", self._prepare_thread)
        self._stream: AbstractContextManager = nullcontext()
        """The thread works in it: on a GPU, a CUDA stream of its own."""
        self._under_way: Future[None] | None = None
        self._group: WeightGroup | None = None
        self._receiver: WeightReceiver | None = None
        """None until this rank has joined a group."""
        self._newcomers: WeightGroup | None = None
        """In which this rank sends what it holds."""
        self._manifest = Manifest(tensors=())
        self._room = Room()
        self._tensors: dict[str, torch.Tensor] = {}

    def make_room(self, manifest: Manifest) -> Future[None]:
        """Leave the group, and begin to allocate memory for this stream unless it is there. Fails with WeightsError
        if the machine has too little."""
        self.leave()
        return self._begin(partial(self._make_room, manifest))

    def join(
        self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest, timeout_s: float
    ) -> Future[None]:
        """Leave the old group, and begin to join the one at `address`. Fails with WeightsError."""
        self.leave()
        return self._begin(partial(self._join, address, rank, world_size, backend, manifest, timeout_s))

    def receive(self, version: int, branch: int) -> Future[None]:
        """Begin to receive this version. Fails with WeightsError; the buffer then holds no version."""
        self.abandon()
        self._room.version = NOTHING
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
        if (staged := self._room.version) != version:
            there = "nothing is" if staged == NOTHING else f"version {staged} is"
            raise WeightsError(f"version {version} has not arrived here: {there} staged")
        return dict(self._tensors)

    def host(self, host: str, backend: Backend, timeout_s: float) -> tuple[str, Manifest]:
        """Open a group in which this rank sends what it holds to one other, who reaches this machine as `host`. Returns
        the group's address, and what is sent."""
        self.abandon()
        self._newcomers = WeightGroup.create_master(host, 2, backend, timeout_s, self._device)
        return self._newcomers.address, self._manifest

    def send(self, version: int, branch: int, bucket_bytes: int) -> Future[None]:
        """Begin to send this version there. Fails with WeightsError."""
        return self._begin(partial(self._send, version, branch, bucket_bytes))

    def abandon(self) -> None:
        """Leave that group; a `send` that still runs fails."""
        if self._newcomers:
            self._newcomers.close()

    @property
    def handle(self) -> bytes:
        """With which another process of the engine can `open` the memory, once this rank has joined; b"" if it isn't
        shared."""
        return self._room.block.handle if self._room.block else b""

    def open(self, handle: bytes, manifest: Manifest) -> None:
        """Take versions of this manifest from the memory of the process that receives. Raises WeightsError."""
        try:
            self._room = Room.within(open_block(handle, HOST))
        except OSError as error:
            raise WeightsError(f"a process of the engine can't reach the weights in another one: {error}") from error
        self._tensors = tensors_in(self._room.stream_U, manifest)

    @property
    def memory(self) -> str:
        """Size and kind of the buffer's memory, for the log."""
        stream_U = self._room.stream_U
        kind = "memory of the GPU" if stream_U.is_cuda else "memory of the host"
        return f"{len(stream_U) / 2**20:.1f} MiB in {kind}" + ", shared by the engine's processes" * self._shared

    def close(self) -> None:
        """Leave the group. A running operation fails."""
        self.leave()
        self._thread.shutdown(wait=False)

    def leave(self) -> None:
        """Leave the group of the learner, too; an operation that still runs fails."""
        self.abandon()
        if self._group:
            self._room.version = NOTHING
            self._group.close()

    def _begin(self, work: Callable[[], None]) -> Future[None]:
        self._under_way = self._thread.submit(_without_frames, work)
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
        self._make_room(manifest)
        with self._stream:
            self._group = WeightGroup(address, rank, world_size, backend, timeout_s, self._device)
            self._group.connect(deadline)
            self._receiver = WeightReceiver(self._group, manifest, self._room.stream_U)

    def _receive(self, version: int, branch: int) -> None:
        assert self._receiver is not None, "`join` comes first"
        with self._stream:
            self._receiver.receive(version, branch=branch)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        self._room.version = version

    def _send(self, version: int, branch: int, bucket_bytes: int) -> None:
        assert self._newcomers is not None, "`host` comes first"
        with closing(self._newcomers) as group, self._stream:
            tensors = self.take(version)
            group.connect()
            WeightSender(group, self._manifest, bucket_bytes).send(version, tensors, branch=branch)

    def _make_room(self, manifest: Manifest) -> None:
        num_bytes = manifest.offsets[-1]
        if len(self._room.stream_U) != num_bytes:
            self._room, self._tensors, self._receiver = Room(), {}, None  # their memory counts as free
            with self._stream:
                self._room = self._new_room(num_bytes)
        self._tensors, self._manifest = tensors_in(self._room.stream_U, manifest), manifest

    def _new_room(self, num_bytes: int) -> Room:
        on_gpu = self._device.type == "cuda"
        may_be_there = on_gpu and not self._shared
        if may_be_there and torch.cuda.mem_get_info(self._device)[0] > ROOM_FACTOR * num_bytes + ROOM_BYTES:
            return Room(torch.empty(num_bytes, dtype=torch.uint8, device=self._device))
        free = psutil.virtual_memory().available
        if num_bytes > free:
            raise WeightsError(
                f"new weights take {num_bytes / GIB:.3g} GiB of the machine's memory for each engine, and "
                f"{free / GIB:.3g} are free"
                + "; with a smaller rollout.memory_fraction the GPU has room for them"
                * may_be_there
            )
        if self._shared:
            room = Room.within(make_block(num_bytes + ALIGN_BYTES, HOST))
            room.version = NOTHING
            return room
        return Room(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu and PIN_FACTOR * num_bytes <= free))


def _without_frames(work: Callable[[], None]) -> None:
    """The buffer keeps an operation's error until the next operation. With its traceback it would keep the collectives
    in those frames, and so the connections of a group that this rank has left: ranks behind it would wait for their
    deadlines."""
    try:
        work()
    except WeightsError as error:
        raise error.with_traceback(None) from error.__cause__


@dataclass
class Room:
    """Memory for a stream, and which version is complete in it. Processes that map the same block see both."""

    stream_U: torch.Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.uint8))
    version_1: torch.Tensor = field(default_factory=partial(torch.tensor, [NOTHING]))
    block: Block | None = None
    """None for memory of this process alone."""

    @staticmethod
    def within(block: Block) -> Room:
        """The stream, and the version behind it."""
        return Room(block.bytes_U[:-ALIGN_BYTES], block.bytes_U[-ALIGN_BYTES:].view(torch.int64)[:1], block)

    @property
    def version(self) -> int:
        return int(self.version_1.item())

    @version.setter
    def version(self, version: int) -> None:
        self.version_1.fill_(version)
