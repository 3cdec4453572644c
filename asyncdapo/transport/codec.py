"""Messages to frames and back: one msgpack header frame, then raw buffer frames that are not read here.

In: bytes from any sender. Out: a typed message and views of its buffers, or `Malformed`, and no other exception. A
claimed size allocates nothing: msgspec grows its lists as elements arrive. Does not own: sockets, and whether a message
makes sense (numbers may be negative, huge or NaN: the reader checks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import UnionType
from typing import Any, TypeVar

import msgspec

from asyncdapo.messages import Message

Buffer = bytes | bytearray | memoryview
Accepted = TypeVar("Accepted", bound=Message)
"""The message type, or the union of them, that one end of a socket accepts."""


class Malformed(Exception):  # noqa: N818 - also used as a value, in place of a peer's message
    """A list of frames that can't be decoded; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a peer may send. Checked before decoding; frame sizes also before they are received."""

    header_bytes: int = 8 << 20
    """Largest header. That of a group of 16 answers of 500 turns each is a quarter of a MiB."""
    num_frames: int = 6
    """The header and the five buffers of a payload."""
    frame_bytes: int = 1 << 30
    """Largest buffer: 256 Mi tokens."""


DEFAULT_LIMITS = Limits()
BATCH_LIMITS = Limits(header_bytes=256 << 20)
"""Of what goes to the learner: a batch has the headers of all its groups."""


def encode(message: Message, frames: Sequence[Buffer] = (), limits: Limits = DEFAULT_LIMITS) -> list[Buffer]:
    """The header frame of `message`, followed by `frames` unchanged.

    Raises ValueError above the limits: the other end would always refuse such a message.
    """
    encoded = [_encoder.encode(message), *frames]
    if problem := _problem(encoded, limits):
        raise ValueError(f"{type(message).__name__} can't be sent: {problem}")
    return encoded


def decode(
    frames: Sequence[Buffer], accepts: type[Accepted] | UnionType, limits: Limits = DEFAULT_LIMITS
) -> tuple[Accepted, list[memoryview]]:
    """The message and its buffer frames (bytes, not copied). Raises Malformed and nothing else.

    `accepts`: the union of the message types that this end expects. Any other type is malformed.
    """
    if problem := _problem(frames, limits):
        raise Malformed(problem)
    try:
        message = _decoder(accepts).decode(frames[0])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Malformed(f"header: {error}") from error
    except RecursionError as error:
        raise Malformed("header: nested too deeply") from error
    return message, [memoryview(frame).cast("B") for frame in frames[1:]]


def _problem(frames: Sequence[Buffer], limits: Limits) -> str | None:
    """Which limit these frames exceed; None if they don't."""
    if not 1 <= len(frames) <= limits.num_frames:
        return f"{len(frames)} frames, expected 1 to {limits.num_frames}"
    header_bytes, *frames_bytes = [memoryview(frame).nbytes for frame in frames]
    if header_bytes > limits.header_bytes:
        return f"header of {header_bytes} bytes, at most {limits.header_bytes}"
    if max(frames_bytes, default=0) > limits.frame_bytes:
        return f"frame of {max(frames_bytes)} bytes, at most {limits.frame_bytes}"
    return None


_encoder = msgspec.msgpack.Encoder()


@lru_cache(maxsize=32)
def _decoder(accepts: type | UnionType) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(accepts)
