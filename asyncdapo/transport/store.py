"""The store of a process group: a few short values with which its ranks find each other, protected by keys.

    rank 0      HostedStore   keeps the values, and answers the others in a thread of its own
    the others  DistantStore  ask it, by ZeroMQ

In: values under names. Out: the same values at every rank, once they are there. torch makes its groups with either
class. The address says where rank 0 listens and contains the group's keys: it is a secret. Invariants: it listens only
on the interface that the address names. A peer without the keys (CURVE, `keys`) can neither store nor read. Every call
ends by its deadline, and at once if rank 0 has died or the store is closed. Does not own: what the values mean.

torch's TCPStore isn't used, since it listens on every interface and accepts 100 MB at a time from anyone.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta
from threading import Event, Lock, Thread
from typing import TypeVar

import torch.distributed as dist
import zmq
import zmq.asyncio

from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.keys import ClientKeys, Door, RunKeys, ServerKeys

POLL_S = 0.02
ANSWER_S = 1.0
"""Time for rank 0's answer at the deadline: that answer may say which ranks are missing."""
MESSAGE_BYTES = 1 << 20
"""Most bytes of a value. Gloo's values and handles of shared memory have a few hundred."""
SET, LOOK = b"set", b"look"
Socket = TypeVar("Socket", bound=zmq.Socket)
GONE = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class GroupStore(dist.Store):  # pyright: ignore[reportPrivateImportUsage] (torch documents it here)
    """What both classes have: `put`, `look` and `get_all` for us, and the methods that torch calls. Raises
    DistStoreError."""

    address: str
    """For the other ranks. It is secret: never log it."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self._timeout_s = timeout_s

    @abstractmethod
    def put(self, key: str, value: bytes, deadline: Deadline) -> None:
        """Store this value."""

    @abstractmethod
    def look(self, keys: Sequence[str], deadline: Deadline) -> list[bytes | None]:
        """The values; None for each that isn't there yet."""

    @abstractmethod
    def close(self) -> None:
        """Leave the store. Calls in other threads fail."""

    def get_all(self, keys: Sequence[str], deadline: Deadline) -> list[bytes]:
        """The values, once all of them are there."""
        while None in (values := self.look(keys, deadline)):
            if deadline.passed:
                raise dist.DistStoreError(f"{keys[values.index(None)]} isn't there after {deadline.timeout_s:g} s")
            time.sleep(POLL_S)
        return [value for value in values if value is not None]

    def set(self, key: str, value: bytes) -> None:
        self.put(key, value, Deadline(self._timeout_s))

    def get(self, key: str) -> bytes:
        return self.get_all([key], Deadline(self._timeout_s))[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self.get_all(keys, Deadline(timeout.total_seconds() if timeout else self._timeout_s))

    def check(self, keys: list[str]) -> bool:
        return None not in self.look(keys, Deadline(self._timeout_s))


class HostedStore(GroupStore):
    """The store at rank 0. Others reach it at `host`, an address of this machine."""

    def __init__(self, host: str, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self._values: dict[str, bytes] = {}
        self._closing = Event()
        weakref.finalize(self, self._closing.set)
        keys, port = RunKeys.make(), Future[int]()
        serving = _answer(host, keys.server, self._values, port, self._closing)
        Thread(target=asyncio.run, args=(serving,), name="store", daemon=True).start()
        try:
            self.address = join_address(host, port.result(), keys.client)
        except zmq.ZMQError as error:
            raise dist.DistStoreError(f"can't listen at {host}: {error}") from error

    def put(self, key: str, value: bytes, deadline: Deadline) -> None:
        self._check_open()
        self._values[key] = value

    def look(self, keys: Sequence[str], deadline: Deadline) -> list[bytes | None]:
        self._check_open()
        return [self._values.get(key) for key in keys]

    def close(self) -> None:
        self._closing.set()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise dist.DistStoreError("the store is closed")


class DistantStore(GroupStore):
    """The store that rank 0 hosts at `address`. Rank 0 has to answer by the deadline."""

    def __init__(self, address: str, timeout_s: float, deadline: Deadline) -> None:
        super().__init__(timeout_s)
        self.address = address
        where, keys = split_address(address)
        self._lock = Lock()
        """Held while a thread uses the socket."""
        self._closed = False
        context = zmq.Context()
        self._socket = _socket(context, zmq.REQ, keys)
        self._gone = self._socket.get_monitor_socket(GONE)
        self._leave = weakref.finalize(self, _leave, context, self._socket, self._gone)
        self._leave.atexit = False  # other threads may still use the socket then
        self._socket.connect(f"tcp://{where}")
        self.look([], deadline)

    def put(self, key: str, value: bytes, deadline: Deadline) -> None:
        self._ask([SET, key.encode(), value], deadline)

    def look(self, keys: Sequence[str], deadline: Deadline) -> list[bytes | None]:
        answer = self._ask([LOOK, *(key.encode() for key in keys)], deadline)
        return [frame[1:] if frame else None for frame in answer[1:]]

    def close(self) -> None:
        self._closed = True
        with self._lock:
            self._leave()

    def _ask(self, request: Sequence[bytes], deadline: Deadline) -> list[bytes]:
        until = time.monotonic() + max(deadline.left().total_seconds(), ANSWER_S * deadline.passed)
        with self._lock:
            if not self._closed:
                self._socket.send_multipart(request)
            while not self._closed:
                if self._socket.poll(round(POLL_S * 1000)):
                    return self._socket.recv_multipart()
                if self._gone.poll(0):
                    raise dist.DistStoreError("rank 0, which keeps the store, is gone")
                if time.monotonic() >= until:
                    raise dist.DistStoreError("rank 0, which keeps the store, gives no answer")
        raise dist.DistStoreError("the store is closed")


def _leave(context: zmq.Context[Socket], socket: Socket, gone: Socket) -> None:
    """Not a method, so that a store that was dropped while open leaves too. The garbage collector may end its context
    before its sockets, and a context waits for its sockets for ever."""
    socket.disable_monitor()
    gone.close()
    socket.close()
    context.term()


def join_address(host: str, port: int, keys: ClientKeys) -> str:
    """`HOST:PORT` and the keys, separated by blanks (no key contains one)."""
    return b" ".join([f"{host}:{port}".encode(), keys.server, keys.public, keys.secret]).decode()


def split_address(address: str) -> tuple[str, ClientKeys]:
    """`HOST:PORT` and the keys of the store there."""
    where, server, public, secret = address.encode().split()
    return where.decode(), ClientKeys(server=server, public=public, secret=secret)


async def _answer(host: str, keys: ServerKeys, values: dict[str, bytes], port: Future[int], closing: Event) -> None:
    """Answer the other ranks until `closing`."""
    context = zmq.asyncio.Context()
    door = Door(context, keys.allowed)
    router = _socket(context, zmq.ROUTER, keys)
    try:
        port.set_result(router.bind_to_random_port(f"tcp://{host}"))
        while not closing.is_set():
            if await router.poll(round(POLL_S * 1000)):
                peer, blank, *request = await router.recv_multipart()
                await router.send_multipart([peer, blank, b"", *_do(request, values)])
    except zmq.ZMQError as error:
        if port.done():
            raise
        port.set_exception(error)
    finally:
        router.close()
        door.close()
        context.term()


def _do(request: Sequence[bytes], values: dict[str, bytes]) -> list[bytes]:
    """The frames of the answer: a value has a dot before it; a missing value is an empty frame."""
    command, *rest = request
    if command == SET:
        key, value = rest
        values[key.decode()] = value
        return []
    return [b"." + values[key.decode()] if key.decode() in values else b"" for key in rest]


def _socket(context: zmq.Context[Socket], kind: int, keys: ServerKeys | ClientKeys) -> Socket:
    socket = context.socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.MAXMSGSIZE, MESSAGE_BYTES)
    keys.apply(socket)
    return socket
