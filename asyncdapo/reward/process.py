"""Main of a verifier process: `python -m asyncdapo.reward.process VERIFIER PID`, started by a pool in process PID.

In: requests on standard input, which is a socket. Out: a verdict for each text, on the same socket. The verifier is the
user's code and may do what it likes: it finds /dev/null at its standard input, its output goes to the worker's log,
processes that it forks don't hold the socket, and Ctrl-C is the worker's to heed. The process ends when the socket
does, and on Linux at its parent's death in any case, even in the middle of a verifier that never returns.

Imports nothing heavy. Does not own: time-outs and retries (the pool's).
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import reprlib
import signal
import socket
import sys
from traceback import TracebackException

from asyncdapo.errors import ConfigError
from asyncdapo.reward.registry import Verify, make_verifier
from asyncdapo.reward.wire import Broken, FromPool, Raised, Ready, Request, Setup, Unpacker, Verdict, pack

PR_SET_PDEATHSIG = 1
READ_BYTES = 1 << 16
MAX_PROBLEM_CHARS = 1000


class Channel:
    """The process's end of the socket pair: blocking, one message at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._unpacker = Unpacker(FromPool)

    def receive(self) -> Setup | Request | None:
        """The next message; None when the pool has closed its end. The pool sends none before the last is answered."""
        while data := self._socket.recv(READ_BYTES):
            if messages := self._unpacker.feed(data):
                [message] = messages
                return message
        return None

    def send(self, message: Ready | Broken | Verdict | Raised) -> None:
        self._socket.sendall(pack(message))

    def close(self) -> None:
        self._socket.close()


def main(verifier: str, parent: int) -> None:
    """Judge texts until the pool closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    end_with(parent)
    channel = take_over_stdin()
    setup = channel.receive()
    if setup is None:
        return
    sys.path[:] = setup.import_path
    try:
        verify = make_verifier(verifier)
    except ConfigError as error:
        channel.send(Broken(str(error)))
        return
    channel.send(Ready())
    while (request := channel.receive()) is not None:
        for text in request.texts:
            said = judge(verify, text, request.answer)
            channel.send(said)
            if isinstance(said, Raised):
                break


def end_with(parent: int) -> None:
    """From here on the kernel kills this process when the thread that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which started this verifier process, is gone")


def take_over_stdin() -> Channel:
    """The socket at standard input, moved to a descriptor that no child inherits."""
    channel = Channel(socket.socket(fileno=os.dup(0)))
    os.register_at_fork(after_in_child=channel.close)
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.close(devnull)
    return channel


def judge(verify: Verify, text: str, answer: str) -> Verdict | Raised:
    """The verdict, or what is wrong with the verifier."""
    try:
        said = verify(text, answer)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the user's function raises ends its group only
        return Raised(describe(error))
    try:
        value = float(said)
    except Exception:  # noqa: BLE001 - what it returned may raise anything in a `__float__` of its own
        value = float("nan")
    if not 0 <= value <= 1:
        return Raised(f"a verdict is a number from 0 to 1, got {reprlib.repr(said)}")
    return Verdict(value)


def describe(error: BaseException) -> str:
    """Type and message of an error, and the last line of its traceback."""
    report = TracebackException.from_exception(error)
    problem = f"{type(error).__name__}: {report}"[:MAX_PROBLEM_CHARS]
    last = report.stack[-1]
    return f"{problem} (in {last.name}, {last.filename}:{last.lineno})"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
