"""Main of a verifier process: `python -m asyncdapo.reward.verifier_main VERIFIER PID`. PID is the pool's process.

In: requests on standard input, which is a socket. Out: a verdict for each text, on the same socket.

The verifier is the user's code and may do anything (`child/entry`); its output goes to the worker's log. The process
ends when the pool closes the socket.

Imports nothing heavy. Does not own: verdicts (`judge`), time-outs (the pool).
"""

from __future__ import annotations

import inspect
import socket
import sys
from functools import partial
from typing import cast

from asyncdapo.child.entry import enter
from asyncdapo.errors import ConfigError
from asyncdapo.reward.config import pauses_s
from asyncdapo.reward.judge import Judge, judge
from asyncdapo.reward.registry import AsyncVerify, Verify, make_verifier
from asyncdapo.reward.wire import Broken, FromPool, FromProcess, Ready, Request, Setup, Unpacker, pack

READ_BYTES = 1 << 16


class Channel:
    """The process's end of the socket pair: blocking, one message at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._unpacker = Unpacker(FromPool)

    def receive(self) -> Setup | Request | None:
        """The next message; None when the pool has closed its end. The pool sends one only after the last answer."""
        while data := self._socket.recv(READ_BYTES):
            if messages := self._unpacker.feed(data):
                [message] = messages
                return message
        return None

    def send(self, message: FromProcess) -> None:
        self._socket.sendall(pack(message))


def main(verifier: str, parent: int) -> None:
    """Judge texts until the pool closes the socket."""
    channel = Channel(enter(parent))
    setup = channel.receive()
    if setup is None:
        return
    assert isinstance(setup, Setup), "the first message"
    sys.path[:] = setup.import_path
    try:
        judge = make_judge(make_verifier(verifier), setup.concurrency, setup.retries)
    except ConfigError as error:
        channel.send(Broken(str(error)))
        return
    channel.send(Ready())
    while (request := channel.receive()) is not None:
        assert isinstance(request, Request), "what follows the first message"
        judge(request.texts, request.answers, channel.send)


def make_judge(verify: Verify, concurrency: int, retries: int) -> Judge:
    """The judge for `verify`, which may be a plain or an async function."""
    if inspect.iscoroutinefunction(verify) or inspect.iscoroutinefunction(type(verify).__call__):
        from asyncdapo.reward.async_judge import (
            AsyncJudge,  # most verifiers don't need asyncio, which is slow to import
        )

        return AsyncJudge(cast(AsyncVerify, verify), concurrency, retries)
    return partial(judge, verify, pauses_s(retries))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
