"""ZeroMQ sockets that carry messages: one `Server` (ROUTER), any number of `Client`s (DEALER).

In: messages of `asyncdapo.messages` with their buffer frames. Out: the same at the other end, or `Malformed`.

    client send     waits while no server is connected or its queue of `CLIENT_QUEUE` messages is full. A slow or absent
                    server slows its clients down, and nothing piles up
    server send     never waits. A message is dropped and counted if its peer is gone (ROUTER_MANDATORY) or has left
                    `PEER_QUEUE` messages unread, so that a peer that doesn't read can't harm the others
    receive         at most `SERVER_QUEUE` messages of each peer wait here; then TCP holds the peer back
    a lost link     clients reconnect by themselves. A peer that comes back under its identity takes its old place.
                    Probes detect silent links. Messages on their way are lost; whoever needs one sends it again.
                    Clients let ZeroMQ probe, the server the kernel: ZeroMQ 4.3.5 ends the process when it is to probe a
                    link that was lost with messages unread
    limits          a frame above the limit closes its peer's connection before it is received. The number of frames is
                    checked before anything is decoded, but after all have arrived, since ZeroMQ delivers whole messages
    memory          frames are copied as they are queued. What pyzmq lends to ZeroMQ it takes back when the interpreter
                    ends, perhaps while ZeroMQ still sends it: peers would receive what stands there by then
    keys            a server with CURVE keys accepts only peers whose key is on its list (`keys`)

A cancelled `receive` loses no message. Does not own: acknowledgement (`delivery`), the list of keys (`keys`), sessions
(the processes at both ends).
"""

from __future__ import annotations

import asyncio
import errno
import weakref
from collections.abc import Sequence
from functools import partial
from types import UnionType
from typing import Generic, cast

import zmq
import zmq.asyncio

from asyncdapo import faults
from asyncdapo.messages import Message
from asyncdapo.transport.codec import DEFAULT_LIMITS, Accepted, Buffer, Limits, Malformed, decode, encode
from asyncdapo.transport.keys import ClientKeys, Door, ServerKeys
from asyncdapo.transport.lossy import LossyLink

CLIENT_QUEUE = 100
SERVER_QUEUE = 1000
PEER_QUEUE = 10_000
PROBE_INTERVAL_MS = 5_000
PROBE_TIMEOUT_MS = 30_000
KEEPALIVE_S = 5
MAX_KEEPALIVES = 5
"""The kernel's probes, without an answer."""
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2_000
COPY_BELOW_BYTES = 64 << 10
NO_WAIT, INCOMING, ROOM = int(zmq.NOBLOCK), int(zmq.POLLIN), int(zmq.POLLOUT)
"""As bare numbers: the flags of pyzmq take a microsecond for each `&`."""
CURVE_BYTES = 64
"""CURVE adds at most this many bytes to a frame."""


class Server(Generic[Accepted]):
    """Receives from and sends to any number of clients, each known by its identity. Needs a running event loop."""

    def __init__(
        self,
        accepts: type[Accepted] | UnionType,
        host: str = "127.0.0.1",
        limits: Limits = DEFAULT_LIMITS,
        port: int = 0,
        curve: ServerKeys | None = None,
    ) -> None:
        """Binds `port` of `host`; 0 takes any free port. Raises zmq.ZMQError if that fails. Without `curve` anyone who
        reaches the address is accepted."""
        self._accepts, self._limits = accepts, limits
        self._link = _lossy_link()
        context = zmq.Context()  # its own, because a context has one door
        self._door = Door(zmq.asyncio.Context(context), curve.allowed) if curve else None
        self._socket = _socket(context, zmq.ROUTER, limits, curve)
        self._watch = Watch(self._socket)
        self._leave = weakref.finalize(self, _leave_server, context, self._watch, self._door)
        self._leave.atexit = False  # its event loop may still run then
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        self._socket.set(zmq.SNDHWM, PEER_QUEUE)
        self._socket.set(zmq.RCVHWM, SERVER_QUEUE)
        self._socket.set(zmq.TCP_KEEPALIVE, 1)
        self._socket.set(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S)
        self._socket.set(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_S)
        self._socket.set(zmq.TCP_KEEPALIVE_CNT, MAX_KEEPALIVES)
        try:
            self._socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError:
            self.close()
            raise
        self.address: str = self._socket.get_string(zmq.LAST_ENDPOINT)
        self.num_malformed = 0
        self.num_dropped = 0
        """Dropped messages: the peer was gone or had too many unread."""

    @property
    def num_refused(self) -> int:
        """Refused connections: their key isn't on the list."""
        return self._door.num_refused if self._door else 0

    async def receive(self) -> tuple[bytes, Accepted | Malformed, list[memoryview]]:
        """The next message with its peer's identity and buffers. Bad input is returned as a `Malformed`, not raised."""
        return (await self.receive_some(1))[0]

    async def receive_some(self, most: int) -> list[tuple[bytes, Accepted | Malformed, list[memoryview]]]:
        """As `receive`: the next message and those that have already arrived after it, up to `most` in all."""
        return list(map(self._decode, await self._watch.some(most)))

    def _decode(self, frames: list[zmq.Frame]) -> tuple[bytes, Accepted | Malformed, list[memoryview]]:
        peer, *parts = frames
        try:
            message, buffers = decode(_buffers(parts), self._accepts, self._limits)
        except Malformed as malformed:
            self.num_malformed += 1
            return peer.bytes, malformed, []
        return peer.bytes, message, buffers

    async def send(self, peer: bytes, message: Message, frames: Sequence[Buffer] = ()) -> None:
        """Send to a peer that has sent something before. Raises ValueError for a message above the limits."""
        encoded, transmit = encode(message, frames, self._limits), partial(self._transmit, peer)
        await (self._link.carry(encoded, transmit) if self._link else transmit(encoded))

    async def _transmit(self, peer: bytes, frames: Sequence[Buffer]) -> None:
        try:
            self._socket.send_multipart([peer, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            self.num_dropped += 1
        self._watch.note()

    def close(self) -> None:
        """Drop queued messages and free the port, at once."""
        if self._link:
            self._link.close()
        self._leave()


class Client(Generic[Accepted]):
    """Talks to one server, and reconnects by itself. Needs a running event loop."""

    def __init__(
        self,
        address: str,
        accepts: type[Accepted] | UnionType,
        identity: bytes,
        limits: Limits = DEFAULT_LIMITS,
        curve: ClientKeys | None = None,
    ) -> None:
        """`identity`: the server's name for this peer, 1 to 255 bytes, the first one not zero, unique among live peers.
        The server may start later. A server with CURVE keys accepts only clients with `curve`."""
        self._accepts, self._limits = accepts, limits
        self._link = _lossy_link()
        self._socket = _socket(zmq.Context.instance(), zmq.DEALER, limits, curve)
        self._watch, self._sending = Watch(self._socket), asyncio.Lock()
        self._leave = weakref.finalize(self, self._watch.leave)
        self._leave.atexit = False
        self._socket.set(zmq.IDENTITY, identity)
        self._socket.set(zmq.IMMEDIATE, 1)
        self._socket.set(zmq.SNDHWM, CLIENT_QUEUE)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.HEARTBEAT_IVL, PROBE_INTERVAL_MS)
        self._socket.set(zmq.HEARTBEAT_TIMEOUT, PROBE_TIMEOUT_MS)
        self._socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        self._socket.connect(address)

    async def receive(self) -> tuple[Accepted, list[memoryview]]:
        """The next message and its buffers. Raises Malformed for bad input; the next call continues after it."""
        return decode(_buffers((await self._watch.some(1))[0]), self._accepts, self._limits)

    async def send(self, message: Message, frames: Sequence[Buffer] = ()) -> None:
        """Queue the message; waits while no server is connected or the queue is full. Raises ValueError for a message
        above the limits."""
        encoded = encode(message, frames, self._limits)
        await (self._link.carry(encoded, self._transmit) if self._link else self._transmit(encoded))

    async def _transmit(self, frames: Sequence[Buffer]) -> None:
        async with self._sending:  # in the order of the calls
            await self._watch.put(frames)

    def close(self) -> None:
        """Drop queued messages and disconnect."""
        if self._link:
            self._link.close()
        self._leave()


class Watch:
    """A socket as the running event loop sees it: the next message, and room for one. ZeroMQ signals a change once, and
    every call on the socket takes the signal away; so whoever sends looks for what has arrived, and the other way
    round."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket, self._loop = socket, asyncio.get_running_loop()
        self._arrived, self._room = asyncio.Event(), asyncio.Event()
        self._loop.add_reader(socket, self.note)

    async def some(self, most: int) -> list[list[zmq.Frame]]:
        """All frames of each of the next messages, at least one and at most so many. Yields to the event loop once, so
        that a flood can't starve it. Takes the messages without a pause, so that a cancelled reader loses none."""
        await asyncio.sleep(0)
        while not (messages := self._take(most)):
            await self._arrived.wait()
        return messages

    def _take(self, most: int) -> list[list[zmq.Frame]]:
        """Of what has arrived."""
        self._arrived.clear()
        messages: list[list[zmq.Frame]] = []
        try:
            while len(messages) < most:
                frames = [self._socket.recv(NO_WAIT, copy=False)]
                while frames[-1].more:
                    frames.append(self._socket.recv(copy=False))
                messages.append(frames)
        except zmq.Again:
            pass
        finally:
            self.note()
        return messages

    async def put(self, frames: Sequence[Buffer]) -> None:
        """Queue a message, once there is room."""
        while True:
            self._room.clear()
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK)
                break
            except zmq.Again:
                self.note()
                await self._room.wait()
        self.note()

    def note(self) -> None:
        """What has become possible."""
        events = cast(int, self._socket.getsockopt(zmq.EVENTS))
        if events & INCOMING:
            self._arrived.set()
        if events & ROOM:
            self._room.set()

    def leave(self) -> None:
        """Close the socket."""
        if not self._loop.is_closed():
            self._loop.remove_reader(self._socket)
        self._socket.close()


def _leave_server(context: zmq.Context[zmq.Socket[bytes]], watch: Watch, door: Door | None) -> None:
    """Not a method, so that a server that was dropped while open leaves too (see `store`)."""
    watch.leave()
    if door:
        door.close()
    context.term()


def _socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, limits: Limits, curve: ServerKeys | ClientKeys | None
) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.MAXMSGSIZE, max(limits.header_bytes, limits.frame_bytes) + CURVE_BYTES * bool(curve))
    if curve:
        curve.apply(socket)
    return socket


def _lossy_link() -> LossyLink | None:
    """A faulty link if the `faults` section asks for one; only tests do."""
    link = faults.link()
    return LossyLink(link) if link else None


def _buffers(frames: Sequence[zmq.Frame]) -> list[Buffer]:
    """The frames' bytes. Small frames are copied: ZeroMQ puts many into one receive buffer, and a view would be
    unaligned and keep that buffer alive."""
    return [frame.bytes if len(frame) < COPY_BELOW_BYTES else frame.buffer for frame in frames]
