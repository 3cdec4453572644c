"""Messages between the pool and its verifier processes: msgpack records, each after its length, on a socket pair.

    pool ──Setup──▶ process ──Ready | Broken──▶ pool          once
    pool ──Request──▶ process ──Verdict, Verdict, …──▶ pool   one for each text as it is judged; `Raised` and
                                                              `NoVerdict` end a request

A process has one request at a time. Nothing is pickled. Imports only msgspec, so that a verifier process starts fast.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
from msgspec import Struct

LENGTH = struct.Struct("<I")

METRICS = ("acc", "score", "seq_reward", "seq_final_reward", "timed_out", "overlong")
"""Metrics of every score (the scorer explains them). A verifier's own metrics have other names."""


class Setup(Struct, tag=True):
    """pool -> process. The first message."""

    import_path: list[str]
    """The worker's `sys.path`, so that the verifier finds the same modules."""
    concurrency: int = 1
    retries: int = 0


class Request(Struct, tag=True):
    """pool -> process. Texts to judge, in order."""

    texts: list[str]
    answers: list[str]
    """Expected of each."""


class Ready(Struct, tag=True):
    """process -> pool. The verifier is loaded."""


class Broken(Struct, tag=True):
    """process -> pool. The verifier can't be loaded; the process ends."""

    problem: str


class Verdict(Struct, tag=True, frozen=True):
    """process -> pool. The verifier's verdict on a text."""

    value: float
    """1 right, 0 wrong; a number between is partial credit."""
    timed_out: bool = False
    """Set by the pool: the verifier took too long, twice."""
    pred: str | None = None
    """The answer that it found in the text, if it tells."""
    metrics: dict[str, float] = {}
    """The verifier's own metrics."""


class Raised(Struct, tag=True):
    """process -> pool. The verifier raised; later texts are not judged."""

    problem: str


class NoVerdict(Struct, tag=True):
    """process -> pool. The verifier returned something that isn't a verdict; later texts are not judged."""

    problem: str


Said = Verdict | Raised | NoVerdict
"""A process's answer for a text."""
FromPool = Setup | Request
FromProcess = Ready | Broken | Said


def pack(message: Struct) -> bytes:
    """The message, after its length."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


class Unpacker:
    """Received bytes in, messages out. Raises msgspec.DecodeError for bytes that aren't a message."""

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
