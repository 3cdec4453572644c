"""What the pool and its verifier processes say to each other: msgpack records behind their length, on a socket pair.

    pool ──Setup──▶ process ──Ready | Broken──▶ pool          once
    pool ──Request──▶ process ──Verdict, Verdict, …──▶ pool   one for each text as it is judged; `Raised` and
                                                              `NoVerdict` end a request

A process has one request at a time. Nothing is pickled, and nothing here imports more than msgspec: a verifier process
has to start fast.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
from msgspec import Struct

LENGTH = struct.Struct("<I")

METRICS = ("acc", "score", "seq_reward", "seq_final_reward", "timed_out", "overlong")
"""Numbers of every score (the scorer says what they are). A verifier's own have other names."""


class Setup(Struct, tag=True):
    """pool -> process. First of all."""

    import_path: list[str]
    """Where the worker finds its modules, so that the verifier finds the same ones."""
    concurrency: int = 1
    retries: int = 0


class Request(Struct, tag=True):
    """pool -> process. Texts to judge in turn."""

    texts: list[str]
    answer: str


class Ready(Struct, tag=True):
    """process -> pool. The verifier is loaded."""


class Broken(Struct, tag=True):
    """process -> pool. The verifier can't be loaded; the process ends."""

    problem: str


class Verdict(Struct, tag=True, frozen=True):
    """process -> pool. What the verifier said of a text."""

    value: float
    """1 right, 0 wrong, between them part of the credit."""
    timed_out: bool = False
    """The pool's own word: the verifier took too long, twice."""
    pred: str | None = None
    """What it took for the answer, if it says so."""
    metrics: dict[str, float] = {}
    """Numbers of the verifier's own."""


class Raised(Struct, tag=True):
    """process -> pool. The verifier raised; the texts after this one are not judged."""

    problem: str


class NoVerdict(Struct, tag=True):
    """process -> pool. The verifier returned what is none; the texts after this one are not judged."""

    problem: str


Said = Verdict | Raised | NoVerdict
"""What a process says of a text."""
FromPool = Setup | Request
FromProcess = Ready | Broken | Said


def pack(message: Struct) -> bytes:
    """The message behind its length."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


class Unpacker:
    """Bytes as they come in, messages out. Raises msgspec.DecodeError for what is no message."""

    def __init__(self, accepts: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(accepts)
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that `data` completes."""
        self._bytes += data
        messages, at = [], 0
        while len(self._bytes) - at >= LENGTH.size:
            end = at + LENGTH.size + LENGTH.unpack_from(self._bytes, at)[0]
            if len(self._bytes) < end:
                break
            messages.append(self._decoder.decode(bytes(self._bytes[at + LENGTH.size : end])))
            at = end
        del self._bytes[:at]
        return messages


_encoder = msgspec.msgpack.Encoder()
