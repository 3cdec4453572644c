"""Frames as a broken or hostile peer sends them: real messages damaged in every way that this file knows, and noise.

An attack runs in a process of its own, as fast as it can; its memory is not that of the server under test.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import zmq

from asyncdapo.transport.keys import ClientKeys

Frames = list[bytes]
LONGS = (0xFFFF_FFFF, 0x7FFF_FFFF, 1 << 24, 1 << 16)
CLAIMS = (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")
"""msgpack's array, map, string, bytes and extension with 32-bit lengths."""
VALUES = (b"\xc0", b"\xc3", b"\x80", b"\x90", b"\xa1x", b"\xcb\x7f\xf8" + bytes(6), b"\xff", b"\xcf" + b"\xff" * 8)
"""nil, true, {}, [], "x", NaN, -1, 2^64 - 1."""


class Mutations:
    """An endless seeded stream of damaged messages."""

    def __init__(self, messages: Sequence[Sequence[bytes]], seed: int) -> None:
        self._messages = [[bytes(frame) for frame in frames] for frames in messages]
        self._random = random.Random(seed)
        self._kinds = [
            self._flip_bits,
            self._truncate,
            self._claim_a_huge_length,
            self._nest,
            self._change_a_value,
            self._add_frames,
            self._drop_frames,
            self._swap_frames,
            self._empty_a_frame,
            self._replace_by_noise,
        ]

    def next(self) -> Frames:
        frames = list(self._random.choice(self._messages))
        for _ in range(self._random.choice((1, 1, 1, 2, 3))):
            frames = self._random.choice(self._kinds)(frames)
        return frames

    def _flip_bits(self, frames: Frames) -> Frames:
        index = self._index(frames)
        frame = bytearray(frames[index])
        for _ in range(self._random.randint(1, 3) if frame else 0):
            frame[self._random.randrange(len(frame))] ^= 1 << self._random.randrange(8)
        return self._with(frames, index, bytes(frame))

    def _truncate(self, frames: Frames) -> Frames:
        index = self._index(frames)
        return self._with(frames, index, frames[index][: self._random.randrange(len(frames[index]) + 1)])

    def _claim_a_huge_length(self, frames: Frames) -> Frames:
        claim = self._random.choice(CLAIMS) + struct.pack(">I", self._random.choice(LONGS))
        return self._insert(frames, claim)

    def _nest(self, frames: Frames) -> Frames:
        return self._insert(
            frames, self._random.choice((b"\x91", b"\x81\xa1x")) * self._random.choice((10, 500, 20_000))
        )

    def _change_a_value(self, frames: Frames) -> Frames:
        return self._insert(frames, self._random.choice(VALUES), replacing=1)

    def _insert(self, frames: Frames, what: bytes, replacing: int = 0) -> Frames:
        header = frames[0] if frames else b""
        at = self._random.randrange(len(header) + 1)
        return [header[:at] + what + header[at + replacing :], *frames[1:]]

    def _add_frames(self, frames: Frames) -> Frames:
        return frames + [self._random.randbytes(self._random.randrange(16))] * self._random.choice((1, 1, 2, 100))

    def _drop_frames(self, frames: Frames) -> Frames:
        return frames[: self._random.randrange(1, len(frames) + 1)]

    def _swap_frames(self, frames: Frames) -> Frames:
        return self._random.sample(frames, len(frames))

    def _empty_a_frame(self, frames: Frames) -> Frames:
        return self._with(frames, self._index(frames), b"")

    def _replace_by_noise(self, frames: Frames) -> Frames:
        return self._with(frames, self._index(frames), self._random.randbytes(self._random.choice((1, 30, 30, 4000))))

    def _index(self, frames: Frames) -> int:
        return self._random.randrange(len(frames))

    def _with(self, frames: Frames, index: int, frame: bytes) -> Frames:
        return [*frames[:index], frame, *frames[index + 1 :]]


@dataclass(frozen=True)
class Attacker:
    """One connection: where to, as whom, and what it damages."""

    address: str
    identity: bytes
    messages: list[Frames]


def attack(attackers: Sequence[Attacker], keys: ClientKeys | None, seed: int, num: int) -> None:
    """Send `num` damaged messages as fast as the servers take them, and read nothing; then hold the line."""
    context = zmq.Context()
    sockets, mutations = [], []
    for number, attacker in enumerate(attackers):
        socket = context.socket(zmq.DEALER)
        socket.set(zmq.IDENTITY, attacker.identity)
        if keys:
            keys.apply(socket)
        socket.connect(attacker.address)
        sockets.append(socket)
        mutations.append(Mutations(attacker.messages, seed + number))
    for number in range(num):
        index = number % len(attackers)
        sockets[index].send_multipart(mutations[index].next())
    signal.pause()


@contextmanager
def under_attack(attackers: Sequence[Attacker], keys: ClientKeys | None, seed: int, num: int) -> Iterator[None]:
    """`attack` in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=attack, args=(attackers, keys, seed, num))
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()
