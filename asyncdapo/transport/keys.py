"""Keys of a run and the door of a server: peers are authenticated before any message is read.

The controller makes `RunKeys` once per run, and each socket gets its part. ZeroMQ asks a `Door` about every peer; the
door checks the server's allow-list. CURVE encrypts and signs all that follows. Invariants: no message of a peer without
an allowed key reaches the application. The door fails closed: if it doesn't answer, no peer gets in. Secrets appear in
no repr, and so in no log or config dump. Does not own: how keys reach the processes (Ray passes them), and what a peer
with a key may send.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import zmq
import zmq.asyncio
from zmq.utils import z85

from asyncdapo.errors import UserError

ZAP_ADDRESS = "inproc://zeromq.zap.01"
"""The address at which libzmq asks about peers; one handler per context (ZeroMQ RFC 27)."""
DOMAIN = b"asyncdapo"

log = logging.getLogger("transport")


@dataclass(frozen=True, kw_only=True)
class ServerKeys:
    """A server's key pair, and the public keys of the peers that it accepts."""

    public: bytes
    secret: bytes = field(repr=False)
    allowed: frozenset[bytes]

    def apply(self, socket: zmq.Socket) -> None:
        """Make the socket accept only these peers. Call it before the socket is bound."""
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, self.secret)
        socket.set(zmq.ZAP_DOMAIN, DOMAIN)
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)


@dataclass(frozen=True, kw_only=True)
class ClientKeys:
    """A client's key pair, and the server's public key."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes

    def apply(self, socket: zmq.Socket) -> None:
        """Use these keys, from the next connection on."""
        socket.set(zmq.CURVE_PUBLICKEY, self.public)
        socket.set(zmq.CURVE_SECRETKEY, self.secret)
        socket.set(zmq.CURVE_SERVERKEY, self.server)


@dataclass(frozen=True, kw_only=True)
class RunKeys:
    """The keys of one run: one pair for its servers, one for its clients. Restarted processes get the same keys."""

    server: ServerKeys
    client: ClientKeys

    @staticmethod
    def make() -> RunKeys:
        """New keys. Raises UserError if ZeroMQ was built without CURVE."""
        if not zmq.has("curve"):
            raise UserError(
                f"pyzmq {zmq.__version__} uses a libzmq {zmq.zmq_version()} built without CURVE, so peers can't be told"
                " apart (pip install --force-reinstall --only-binary :all: pyzmq)"
            )
        (server, server_secret), (client, client_secret) = zmq.curve_keypair(), zmq.curve_keypair()
        return RunKeys(
            server=ServerKeys(public=server, secret=server_secret, allowed=frozenset([client])),
            client=ClientKeys(public=client, secret=client_secret, server=server),
        )


class Door:
    """Answers for the peers of one context, in the running event loop. Open it before the server binds."""

    def __init__(self, context: zmq.asyncio.Context, allowed: frozenset[bytes]) -> None:
        self._allowed = allowed
        self.num_refused = 0
        """Connections with a key that isn't allowed. libzmq drops those without a key before it asks."""
        self._socket = context.socket(zmq.REP)
        self._socket.set(zmq.LINGER, 0)
        self._socket.bind(ZAP_ADDRESS)
        self._answering = asyncio.create_task(self._answer())

    async def _answer(self) -> None:
        while True:
            version, request, _, address, _, mechanism, *credentials = await self._socket.recv_multipart()
            enters = mechanism == b"CURVE" and z85.encode(credentials[0]) in self._allowed
            if not enters:
                self._refuse(address)
            verdict = (b"200", b"OK") if enters else (b"400", b"unknown key")
            await self._socket.send_multipart([version, request, *verdict, b"", b""])

    def _refuse(self, address: bytes) -> None:
        """Logged once, since a refused peer keeps reconnecting."""
        self.num_refused += 1
        if self.num_refused == 1:
            log.warning("a peer at %s has a key of another run, and is refused", address.decode(errors="replace"))

    def close(self) -> None:
        self._answering.cancel()
        self._socket.close()
