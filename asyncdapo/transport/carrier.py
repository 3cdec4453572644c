"""Carriers: how buckets of bytes get from rank 0 of a connected process group to all others.

    BroadcastCarrier    by broadcasts of NCCL, which knows the links between GPUs and machines
    RelayCarrier        through memory within a host, over the network from host to host

In: buckets. Rank 0 sends from its two `buffers`, in turn; the other ranks pass buckets to fill. Out: the same bytes at
every rank. Invariants: at most two buckets are on their way. Either pipeline (`carry(n+1)` before `wait(n)`) or issue
all carries first; every rank does the same. When `wait` returns, rank 0 may reuse the buffer, and the others have
their bytes. Every failure is the group's error, within the deadline. Does not own: what the bytes mean.

The first rank of each host leads it, and the leaders form a chain. So each host receives the weights once and sends
them once, however many there are. A chain of H hosts takes as long as one link, and H - 2 buckets longer.

    host a                        host b                        host c
    rank 0 ─────── network ─────▶ rank 2 ─────── network ─────▶ rank 5
      └─ memory ─▶ rank 1           ├─ memory ─▶ rank 3
                                    └─ memory ─▶ rank 4

    a leader                         a reader of its host              the leader of the next host
    bucket into block 0, notice ───▶ notice: copy block 0
    the bucket's bytes ──────────────────────────────────────────────▶ as on the left
    bucket into block 1, notice ───▶ …
    block 0 is free    ◀──────────── copied

Shape: U bytes (uint8).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from struct import Struct
from typing import Protocol

import torch

from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.process_group import Collective, ProcessGroup
from asyncdapo.transport.shared_memory import Block, make_block, open_block

NOTICE = Struct("<qq1008s")
"""Of a bucket: its bytes, and the handle of the block in which it is, with its length."""


@dataclass(frozen=True)
class Route:
    """One rank's place on the way of a bucket."""

    source: int | None
    """Whom it hears of a bucket; None at rank 0."""
    leads: bool
    """Whether it is the first of its host. Its bytes then come over the network; those of other ranks are in memory of
    their leader."""
    next: int | None
    """The leader to which it sends the bytes over the network; None if there is none after it."""
    readers: tuple[int, ...]
    """The other ranks of its host, if it leads it."""


def route_of(rank: int, hosts: Sequence[Hashable]) -> Route:
    """The route of this rank; `hosts` has the host of each. Every rank but 0 hears of each bucket from one rank; bytes
    enter a host once, and leave it at most once."""
    leaders = list({host: hosts.index(host) for host in hosts}.values())
    leader = hosts.index(hosts[rank])
    if rank != leader:
        return Route(source=leader, leads=False, next=None, readers=())
    place = leaders.index(rank)
    return Route(
        source=leaders[place - 1] if place else None,
        leads=True,
        next=leaders[place + 1] if place + 1 < len(leaders) else None,
        readers=tuple(other for other, host in enumerate(hosts) if host == hosts[rank] and other != rank),
    )


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

    def close(self) -> None:
        """Forget what is on its way; the group is closed."""


class BroadcastCarrier:
    """Every bucket is a broadcast."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def buffers(self, num_bytes: int) -> list[Block]:
        return [Block(torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)) for _ in range(2)]

    def reaches(self, device: torch.device) -> bool:
        return device.type == self.device.type

    @property
    def device(self) -> torch.device:
        return self._group.device

    def carry(self, bucket_U: torch.Tensor, deadline: Deadline) -> Transfer:
        return self._group.broadcast(bucket_U, deadline)

    def close(self) -> None:
        """Nothing is kept here."""


class RelayCarrier:
    """Each rank hears of a bucket from one other rank, and passes it on. Blocks are on `device`: the host, or the GPU
    that all ranks share."""

    def __init__(self, group: ProcessGroup, route: Route, device: torch.device) -> None:
        self._group, self._route, self._device = group, route, device
        self._blocks = [Block(torch.empty(0, dtype=torch.uint8))] * 2
        """What the other ranks of this host read, the one to fill next first."""
        self._passing: list[Collective] = []
        """What tells other ranks of the bucket before last, and brings it to them."""
        self._open = lru_cache(2)(partial(open_block, device=device))

    def buffers(self, num_bytes: int) -> list[Block]:
        try:
            self._blocks = [make_block(num_bytes, self._device) for _ in range(2)]
        except OSError as error:
            raise self._group.error(f"the memory of rank 0 can't be shared: {error}") from error
        return list(self._blocks)

    def reaches(self, device: torch.device) -> bool:
        return not self._route.leads or device.type == "cpu"

    @property
    def device(self) -> torch.device:
        return self._device

    def carry(self, bucket_U: torch.Tensor, deadline: Deadline) -> Transfer:
        source = self._route.source
        if source is None:
            [block] = [block for block in self._blocks if block.bytes_U.data_ptr() == bucket_U.data_ptr()]
            self._synchronize()
            return Relay(self._forwarded(bucket_U, deadline) + self._offered(block, len(bucket_U), deadline))
        self._finish_passing()
        if self._route.leads:
            arriving = self._group.receive(bucket_U, source, deadline)
            return Relay([arriving], partial(self._pass_on, bucket_U, deadline))
        notice_U = torch.zeros(NOTICE.size, dtype=torch.uint8)
        heard = self._group.receive(notice_U, source, deadline)
        return Relay([heard], partial(self._copy, notice_U, bucket_U, source, deadline))

    def close(self) -> None:
        self._passing = []

    def _finish_passing(self) -> None:
        """From then on the memory of the bucket before last may be written."""
        passing, self._passing = self._passing, []
        for collective in passing:
            collective.wait()

    def _pass_on(self, bucket_U: torch.Tensor, deadline: Deadline) -> None:
        """At the leader of another host than rank 0's, once the bucket is here."""
        self._passing += self._forwarded(bucket_U, deadline)
        if self._route.readers:
            block = self._blocks.pop(0)
            if len(block.bytes_U) < len(bucket_U):
                block = make_block(len(bucket_U), self._device)
            self._blocks.append(block)
            block.bytes_U[: len(bucket_U)].copy_(bucket_U)
            self._passing += self._offered(block, len(bucket_U), deadline)

    def _forwarded(self, bucket_U: torch.Tensor, deadline: Deadline) -> list[Collective]:
        """Begin to send the bucket to the next host, if there is one."""
        following = self._route.next
        return [] if following is None else [self._group.send(bucket_U, following, deadline)]

    def _offered(self, block: Block, num_bytes: int, deadline: Deadline) -> list[Collective]:
        """Begin to tell the readers that a bucket is in this block. They answer when they have copied it."""
        notice = NOTICE.pack(num_bytes, len(block.handle), block.handle)
        offered: list[Collective] = []
        for reader in self._route.readers:
            notice_U = torch.frombuffer(bytearray(notice), dtype=torch.uint8)
            offered.append(self._group.send(notice_U, reader, deadline))
            offered.append(self._group.receive(torch.zeros(1), reader, deadline))
        return offered

    def _copy(self, notice_U: torch.Tensor, bucket_U: torch.Tensor, leader: int, deadline: Deadline) -> None:
        """At a reader: copy the bucket of which the leader has told, and say so."""
        num_bytes, handle_bytes, handle = NOTICE.unpack(notice_U.numpy().data)
        if num_bytes != len(bucket_U):
            raise self._group.error(f"a bucket of {num_bytes} bytes where {len(bucket_U)} were expected")
        try:
            block = self._open(handle[:handle_bytes])
        except OSError as error:
            ranks = f"rank {self._group.rank} can't reach the memory of rank {leader}"
            raise self._group.error(f"{ranks}: {error}") from error
        bucket_U.copy_(block.bytes_U[:num_bytes])
        self._synchronize()
        self._passing.append(self._group.send(torch.zeros(1), leader, deadline))

    def _synchronize(self) -> None:
        """Wait for copies on the GPU: other processes can't see whether they are over."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


@dataclass(frozen=True)
class Relay:
    """A bucket at one rank: what has to arrive there or elsewhere, and what follows from it."""

    collectives: Sequence[Collective]
    then: Callable[[], None] = lambda: None

    def wait(self) -> None:
        for collective in self.collectives:
            collective.wait()
        self.then()
