"""Messages to frames and back: one msgpack header frame, then raw buffer frames that are never looked into here.

In: bytes that anybody may have sent. Out: a typed message and views on its buffers, or `Malformed`; no other exception,
and no allocation in proportion to a size that the bytes only claim (msgspec grows its lists as elements arrive).
Does not own: sockets, and whether a message makes sense (numbers may be negative, huge or NaN: its reader checks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import UnionType

import msgspec

from asyncdapo.messages import Message

Buffer = bytes | bytearray | memoryview


class Malformed(Exception):  # noqa: N818 - also handed over as a value that stands for what a peer sent
    """A frame list that can't be decoded; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a peer may send at most; checked before anything is decoded, frame sizes also before they are received."""

    header_bytes: int = 8 << 20
    """Largest header: metadata of one batch of several thousand completions is about 1 MiB."""
    num_frames: int = 4
    """Header and the three buffers of a payload."""
    frame_bytes: int = 1 << 30
    """Largest buffer: 256 Mi tokens."""


DEFAULT_LIMITS = Limits()


def encode(message: Message, frames: Sequence[Buffer] = (), limits: Limits = DEFAULT_LIMITS) -> list[Buffer]:
    """The header frame of `message` followed by `frames` as they are.

    Raises ValueError above the limits: the other end would refuse it, however often it were sent.
    """
    encoded = [_encoder.encode(message), *frames]
    if problem := _problem(encoded, limits):
        raise ValueError(f"{type(message).__name__} can't be sent: {problem}")
    return encoded


def decode(
    frames: Sequence[Buffer], accepts: type | UnionType, limits: Limits = DEFAULT_LIMITS
) -> tuple[Message, list[memoryview]]:
    """The message and its buffer frames (bytes, without a copy). Raises Malformed and nothing else.

    `accepts` is the union of the message types that this end of the wire expects; another type is malformed.
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
    """Which limit these frames exceed."""
    if not 1 <= len(frames) <= limits.num_frames:
        return f"{len(frames)} frames, expected 1 to {limits.num_frames}"
    header_bytes, *frames_bytes = (memoryview(frame).nbytes for frame in frames)
    if header_bytes > limits.header_bytes:
        return f"header of {header_bytes} bytes, at most {limits.header_bytes}"
    if max(frames_bytes, default=0) > limits.frame_bytes:
        return f"frame of {max(frames_bytes)} bytes, at most {limits.frame_bytes}"
    return None


_encoder = msgspec.msgpack.Encoder()


@lru_cache(maxsize=32)
def _decoder(accepts: type | UnionType) -> msgspec.msgpack.Decoder:
    return msgspec.msgpack.Decoder(accepts)
