"""Keys of a run and the door of a server: who may speak to it is decided before a message is read.

The controller makes `RunKeys` once per run; sockets take their part. A `Door` answers ZeroMQ's question about every
peer by the server's allow-list, and CURVE encrypts and signs all that follows. The invariant: a peer without an allowed
key gets no message to the application, and the door fails closed: while nobody answers for it, nobody enters. A secret
shows in no repr, so in no log and no config dump.
Does not own: how keys reach the processes (Ray hands them over), and what a peer with a key may say.
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
"""Where libzmq asks about peers, one handler per context (ZeroMQ RFC 27)."""
DOMAIN = b"asyncdapo"

log = logging.getLogger("transport")


@dataclass(frozen=True, kw_only=True)
class ServerKeys:
    """What a server needs: its pair, and the public keys of those that may speak to it."""

    public: bytes
    secret: bytes = field(repr=False)
    allowed: frozenset[bytes]

    def apply(self, socket: zmq.Socket) -> None:
        """Close the socket's door, before it is bound."""
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, self.secret)
        socket.set(zmq.ZAP_DOMAIN, DOMAIN)
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)


@dataclass(frozen=True, kw_only=True)
class ClientKeys:
    """What a client needs: its pair, and the public key by which it knows the server."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes

    def apply(self, socket: zmq.Socket) -> None:
        """Show these keys, from the next connection on."""
        socket.set(zmq.CURVE_PUBLICKEY, self.public)
        socket.set(zmq.CURVE_SECRETKEY, self.secret)
        socket.set(zmq.CURVE_SERVERKEY, self.server)


@dataclass(frozen=True, kw_only=True)
class RunKeys:
    """The keys of one run: one pair for its servers, one for its clients. Restarted processes get the same."""

    server: ServerKeys
    client: ClientKeys

    @staticmethod
    def make() -> RunKeys:
        """New keys. Raises UserError when ZeroMQ was built without CURVE."""
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
        """Connections with a key that isn't allowed. Those without a key are dropped by libzmq before it asks."""
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
        """Said once: a peer that is refused comes again and again."""
        self.num_refused += 1
        if self.num_refused == 1:
            log.warning("a peer at %s has a key of another run, and is refused", address.decode(errors="replace"))

    def close(self) -> None:
        self._answering.cancel()
        self._socket.close()
