"""Who listens where on this machine, and strangers who speak to them."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

import psutil


@dataclass(frozen=True)
class Port:
    """A TCP socket that takes connections."""

    pid: int
    host: str
    number: int

    @property
    def on_loopback(self) -> bool:
        address = IPv6Address(self.host) if ":" in self.host else IPv4Address(self.host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def listening(pids: Iterable[int]) -> list[Port]:
    """The ports of these processes."""
    ports = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            sockets = psutil.Process(pid).net_connections("tcp")
            ports += [Port(pid, *one.laddr) for one in sockets if one.status == psutil.CONN_LISTEN]
    return ports


GARBAGE = (
    b"",  # half open: connects and says nothing
    b"\x00" * 8,  # Gloo: the first connection that it waits for
    secrets.token_bytes(4096),
    b"\xff" * (1 << 20),
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL",  # ZeroMQ's greeting, without keys
    b"\x00" + (100 << 20).to_bytes(8, "little") + b"k" * 1000,  # a key of 100 MB begins, as for torch's store
)


@contextmanager
def strangers(ports: Iterable[int], rounds: int = 1) -> Iterator[None]:
    """Connections to each of these ports of loopback that send garbage, and stay open without reading."""
    with ExitStack() as stack:
        for _ in range(rounds):
            for port in ports:
                for garbage in GARBAGE:
                    stack.enter_context(_stranger(port, garbage))
        yield


def _stranger(port: int, garbage: bytes) -> socket.socket:
    stranger = socket.socket()
    with suppress(OSError):  # it may hang up, and take no more than it has room for
        stranger.connect(("127.0.0.1", port))
        stranger.setblocking(False)
        stranger.send(garbage)
    return stranger
