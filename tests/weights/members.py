"""Receivers in processes of their own, driven from a test through a pipe.

A `Member` is told what to do (`start`) and asked later how it went (`result`), so that a test can be the sender in
between. The fork server imports torch once; a member then starts in a few hundredths of a second.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Thread

import torch

from asyncdapo.errors import WeightsError
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.process_group import Broadcast, Deadline
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.header import NUM_WORDS, Verdict, settle
from asyncdapo.weights.layout import Manifest
from asyncdapo.weights.receiver import WeightReceiver

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__])

Print = dict[str, tuple[str, tuple[int, ...], str]]


def fingerprint(tensors: dict[str, torch.Tensor]) -> Print:
    """Dtype, shape and hash of the bytes of each tensor: equal where the tensors are, bit by bit."""
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(raw_bytes(tensor)).hexdigest())
        for name, tensor in tensors.items()
    }


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Failed:
    """What a member's WeightsError said, and when it was raised."""

    reason: str
    after_s: float


class Member:
    """One receiver's process."""

    def __init__(self) -> None:
        self._pipe, theirs = processes.Pipe()
        self.process = processes.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, action: str, *args: object) -> None:
        self._pipe.send((action, args))

    def result(self) -> Print | Failed | None:
        """What the action came to. Raises EOFError when the member died in it."""
        return self._pipe.recv()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


@contextmanager
def members(count: int) -> Iterator[list[Member]]:
    started = [Member() for _ in range(count)]
    try:
        yield started
    finally:
        for member in started:
            member.stop()


def form_group(joining: list[Member], timeout_s: float = 20.0, backend: Backend = "gloo") -> WeightGroup:
    """A connected group of this process (the learner) and the members, in the order of their ranks."""
    group = WeightGroup.create_master("127.0.0.1", len(joining) + 1, backend, timeout_s)
    for rank, member in enumerate(joining, start=1):
        member.start("join", group.address, rank, len(joining) + 1, backend, timeout_s)
    group.connect()
    for member in joining:
        assert member.result() is None
    return group


# ------------------------------------------------------------------------------------------- in the member's process


class Life:
    """The actions of a member; the methods are called by name."""

    group: WeightGroup

    def join(self, *args: object) -> None:
        self.group = WeightGroup.join(*args)

    def set_environment(self, variables: dict[str, str]) -> None:
        os.environ.update(variables)

    def receive(self, manifest: Manifest, version: int, branch: int = 0, device: str = "cpu") -> Print:
        weights = WeightReceiver(self.group, manifest, torch.device(device)).receive(version, branch=branch)
        assert all(tensor.device.type == device for tensor in weights.values())
        return fingerprint(weights)

    def receive_flipped(self, manifest: Manifest, version: int) -> Print:
        """Receive through a network that turns one bit around."""
        self.group.__class__ = FlippingGroup
        return self.receive(manifest, version)

    def die_in_transfer(self) -> None:
        """Agree to the header, take one bucket, and be killed."""
        deadline = Deadline(self.group.timeout_s)
        self.group.broadcast(torch.zeros(NUM_WORDS, dtype=torch.int64), deadline).wait()
        settle(self.group, Verdict.GOOD, deadline)
        self.group.broadcast(torch.zeros(64, dtype=torch.uint8), deadline).wait()
        os.kill(os.getpid(), signal.SIGKILL)

    def count_during_receive(self, manifest: Manifest, version: int) -> Print | int:
        """Receive in a thread, and tell how many naps another thread could take meanwhile."""
        outcome: list[WeightsError] = []

        def receive() -> None:
            try:
                self.receive(manifest, version)
            except WeightsError as error:
                outcome.append(error)

        thread = Thread(target=receive)
        thread.start()
        num_naps = 0
        while thread.is_alive():
            time.sleep(0.01)
            num_naps += 1
        return num_naps


class FlippingGroup(WeightGroup):
    """Turns the lowest bit of each bucket's first byte around after it arrived."""

    def broadcast(self, tensor: torch.Tensor, deadline: Deadline) -> Broadcast:
        broadcast = super().broadcast(tensor, deadline)
        return FlippedBroadcast(broadcast, tensor) if tensor.dtype == torch.uint8 else broadcast


@dataclass(frozen=True)
class FlippedBroadcast:
    arriving: Broadcast
    tensor: torch.Tensor

    def wait(self) -> None:
        self.arriving.wait()
        self.tensor[0] ^= 1


def serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    life = Life()
    while True:
        action, args = pipe.recv()
        began_s = time.monotonic()
        try:
            pipe.send(getattr(life, action)(*args))
        except WeightsError as error:
            pipe.send(Failed(str(error), time.monotonic() - began_s))
