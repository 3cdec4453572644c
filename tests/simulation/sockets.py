"""Sockets without a network: the interface of `transport.sockets`, links that lose, delay, repeat, reorder and cut.

In: messages of the product, through its own codec. Out: the same at the other end, or `Malformed`, or nothing; what
becomes of each is decided by the product's own `faults.Link` from the seed. As over ZeroMQ

    a client waits while its server is gone, and is connected again a moment after the next one is there
    messages under way to a process that dies are lost, and those to a peer that was never heard are dropped

Does not own: who is alive (`process`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from types import UnionType
from typing import TYPE_CHECKING

from asyncdapo import faults
from asyncdapo.eval_messages import EvalRequest
from asyncdapo.messages import Lease, Message
from asyncdapo.transport.codec import Buffer, Malformed, decode, encode

if TYPE_CHECKING:
    from tests.simulation.process import Process

RECONNECT_S = 0.1


class Network:
    """All sockets of a simulated run."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: faults.Settings) -> None:
        self.loop, self.settings = loop, settings
        self.perfect = False
        """No link does any harm any more."""
        self.servers: dict[str, Server] = {}
        self.cut_off: set[str] = set()
        """Processes that no message reaches or leaves."""
        self._num_links = 0

    def link(self, process: Process) -> faults.Link:
        self._num_links += 1
        return faults.Link(self.settings, f"{process.name} {self._num_links}")

    def reaches(self, *processes: Process) -> bool:
        return all(process.alive and process.name not in self.cut_off for process in processes)


class _Socket:
    """One end: messages that have arrived, and a link for those that leave."""

    def __init__(self, network: Network, process: Process, accepts: type | UnionType) -> None:
        self._network, self.process, self._accepts = network, process, accepts
        self._link, self._last_at = network.link(process), 0.0
        self._arrived: deque = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.closed = False
        process.sockets.append(self)

    def _send(self, other: _Socket, sender: bytes, message: Message, frames: Sequence[Buffer]) -> None:
        network, encoded = self._network, encode(message, frames)
        if not network.reaches(self.process, other.process):
            return
        now = network.loop.time()
        passed = [(max(now, self._last_at), encoded)] if network.perfect else self._link.pass_on(encoded, now)
        for at, faulty in passed:
            self._last_at = max(self._last_at, at)
            network.loop.call_at(at, other._deliver, self, sender, faulty)

    def _deliver(self, source: _Socket, sender: bytes, frames: Sequence[Buffer]) -> None:
        if self.closed or source.closed or not self._network.reaches(self.process, source.process):
            return
        self._arrived.append((sender, frames))
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def _next(self) -> tuple[bytes, Sequence[Buffer]]:
        while not self._arrived:
            self._waiter = self._network.loop.create_future()
            await self._waiter
        return self._arrived.popleft()

    def close(self) -> None:
        self.closed = True


class Server(_Socket):
    """In place of `transport.sockets.Server`."""

    def __init__(self, network: Network, process: Process, accepts: type | UnionType, address: str) -> None:
        super().__init__(network, process, accepts)
        self.address, self.peers = address, {}
        network.servers[address] = self

    async def receive(self) -> tuple[bytes, Message | Malformed, list[memoryview]]:
        peer, frames = await self._next()
        try:
            return peer, *decode(frames, self._accepts)
        except Malformed as malformed:
            return peer, malformed, []

    async def receive_some(self, most: int) -> list[tuple[bytes, Message | Malformed, list[memoryview]]]:
        received = [await self.receive()]
        while self._arrived and len(received) < most:
            received.append(await self.receive())
        return received

    async def send(self, peer: bytes, message: Message, frames: Sequence[Buffer] = ()) -> None:
        if isinstance(message, Lease | EvalRequest):
            self.process.note_grant(peer, message)
        if client := self.peers.get(peer):
            self._send(client, b"", message, frames)

    def _deliver(self, source: _Socket, sender: bytes, frames: Sequence[Buffer]) -> None:
        self.peers[sender] = source
        super()._deliver(source, sender, frames)


class Client(_Socket):
    """In place of `transport.sockets.Client`."""

    def __init__(
        self, network: Network, process: Process, accepts: type | UnionType, address: str, identity: bytes
    ) -> None:
        super().__init__(network, process, accepts)
        self._address, self._identity = address, identity
        self._server: Server | None = None

    async def receive(self) -> tuple[Message, list[memoryview]]:
        _, frames = await self._next()
        return decode(frames, self._accepts)

    async def send(self, message: Message, frames: Sequence[Buffer] = ()) -> None:
        while self._server is None or self._server.closed:
            self._server = self._network.servers.get(self._address)
            await asyncio.sleep(RECONNECT_S if self._server is None or self._server.closed else 0)
        self._send(self._server, self._identity, message, frames)
