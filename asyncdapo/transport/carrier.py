"""Carriers: how buckets of bytes get from rank 0 of a connected process group to all others.

    GroupCarrier     by broadcasts of the group: over a network, or NCCL
    SharedCarrier    through two blocks of memory that all ranks map; only short notices go through the group

In: buckets. Rank 0 sends from its two `buffers`, in turn; the other ranks pass buckets to fill. Out: the same bytes at
every rank. Invariants: at most two buckets are on their way. Either pipeline (`carry(n+1)` before `wait(n)`) or issue
all carries first; every rank does the same. When `wait` returns, rank 0 may reuse the buffer, and the others have
their bytes. Every failure is the group's error, within the deadline. Does not own: what the bytes mean.

    rank 0                                   the others
    bucket into block 0, word (0, size) ───▶ word is there: copy block 0
    bucket into block 1, word (1, size) ───▶ …
    block 0 is free          ◀────────────── roll call: copied

Shape: U bytes (uint8).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import msgspec
import torch

from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.process_group import ROOT, Collective, ProcessGroup
from asyncdapo.transport.shared_memory import Block, make_block, open_block

NOTE = "memory"
"""Key in the group's store under which rank 0 leaves the blocks' handles."""


class Transfer(Protocol):
    """A bucket on its way."""

    def wait(self) -> None:
        """Block until the transfer is over. Raises the group's error."""


class Carrier(Protocol):
    """One rank's way to send or receive buckets; made when the group is connected."""

    def buffers(self, num_bytes: int) -> list[Block]:
        """At rank 0: two buffers of this size, to fill in turn. Other processes can open those in host memory. Call it
        once."""
        ...

    def reaches(self, device: torch.device) -> bool:
        """Whether `carry` can fill a tensor on this device."""
        ...

    @property
    def device(self) -> torch.device:
        """The device on which it can fill any tensor."""
        ...

    def carry(self, bucket_U: torch.Tensor, deadline: Deadline) -> Transfer:
        """Rank 0: start to send `bucket_U`, the beginning of a buffer that isn't in use. Elsewhere: start to fill
        it."""
        ...


class GroupCarrier:
    """Every bucket is a broadcast."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def buffers(self, num_bytes: int) -> list[Block]:
        if self.device.type == "cpu":
            return [make_block(num_bytes, self.device) for _ in range(2)]
        return [Block(torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)) for _ in range(2)]

    def reaches(self, device: torch.device) -> bool:
        return device.type == self.device.type

    @property
    def device(self) -> torch.device:
        return self._group.device

    def carry(self, bucket_U: torch.Tensor, deadline: Deadline) -> Transfer:
        return self._group.broadcast(bucket_U, deadline)


class SharedCarrier:
    """Every bucket is in memory that rank 0 has made on `device`: the host, or the GPU that all ranks share."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._made: list[Block] = []
        """At rank 0: both blocks, once `buffers` was called."""

    def buffers(self, num_bytes: int) -> list[Block]:
        try:
            self._made = [make_block(num_bytes, self._device) for _ in range(2)]
        except OSError as error:
            raise self._group.error(f"the memory of rank 0 can't be shared: {error}") from error
        self._group.post(NOTE, msgspec.msgpack.encode([block.handle for block in self._made]))
        return self._made

    def reaches(self, device: torch.device) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return self._device

    def carry(self, bucket_U: torch.Tensor, deadline: Deadline) -> Transfer:
        if self._group.rank == ROOT:
            self.settle()
            number = [block.bytes_U.data_ptr() for block in self._made].index(bucket_U.data_ptr())
            word = torch.tensor([number, len(bucket_U)])
            return Offer(self._group, self._group.broadcast(word, deadline), deadline)
        word = torch.zeros(2, dtype=torch.int64)
        return Fetch(self, self._group, word, self._group.broadcast(word, deadline), bucket_U, deadline)

    @cached_property
    def opened(self) -> list[Block]:
        """Both blocks of rank 0. They exist once its first notice has arrived."""
        handles = msgspec.msgpack.decode(self._group.read(NOTE))
        try:
            return [open_block(handle, self._device) for handle in handles]
        except OSError as error:
            raise self._group.error(f"rank {self._group.rank} can't reach the memory of rank 0: {error}") from error

    def settle(self) -> None:
        """Wait for copies on the GPU: other processes can't see whether they are over."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


@dataclass(frozen=True)
class Offer:
    """At rank 0: a bucket for the others to copy."""

    group: ProcessGroup
    word: Collective
    deadline: Deadline

    def wait(self) -> None:
        self.word.wait()
        self.group.roll_call(self.deadline).wait()


@dataclass(frozen=True)
class Fetch:
    """At the other ranks: a bucket that `wait` copies."""

    carrier: SharedCarrier
    group: ProcessGroup
    word: torch.Tensor
    told: Collective
    bucket_U: torch.Tensor
    deadline: Deadline

    def wait(self) -> None:
        self.told.wait()
        number, num_bytes = self.word.tolist()
        if num_bytes != len(self.bucket_U):
            raise self.group.error(f"a bucket of {num_bytes} bytes where {len(self.bucket_U)} were expected")
        self.bucket_U.copy_(self.carrier.opened[number].bytes_U[:num_bytes])
        self.carrier.settle()
        self.group.roll_call(self.deadline)  # only rank 0 waits for it
