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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

import torch

from asyncdapo.errors import WeightsError
from asyncdapo.transport import process_group
from asyncdapo.transport.backend import HOST_ID, Backend
from asyncdapo.transport.carrier import Carrier, Transfer
from asyncdapo.transport.deadline import Deadline
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.header import Header, agree
from asyncdapo.weights.manifest import Manifest, plan_buckets
from asyncdapo.weights.receiver import WeightReceiver

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.weights.shard_ranks"])

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
    """One end's process: a receiver's, unless it is made for the actions of another class."""

    def __init__(self, life: type | None = None) -> None:
        self._pipe, theirs = processes.Pipe()
        self.process = processes.Process(target=serve, args=(theirs, life or Life), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, action: str, *args: object) -> None:
        self._pipe.send((action, args))

    def result(self) -> Any:
        """What the action came to, `Failed` if a WeightsError. Raises EOFError when the member died in it."""
        return self._pipe.recv()

    def do(self, action: str, *args: object) -> Any:
        """As `start` and `result`."""
        self.start(action, *args)
        return self.result()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


@contextmanager
def members(count: int, life: type | None = None) -> Iterator[list[Member]]:
    started = [Member(life) for _ in range(count)]
    try:
        yield started
    finally:
        for member in started:
            member.stop()


def form_group(
    joining: list[Member],
    timeout_s: float = 20.0,
    backend: Backend = "gloo",
    device: str = "cpu",
    hosts: Sequence[str] = (),
) -> WeightGroup:
    """A connected group of this process (the learner) and the members, in the order of their ranks; all keep their
    weights on `device`. `hosts`: the members' own, as if they were on other machines than the learner."""
    for member, host in zip(joining, hosts, strict=False):
        assert member.do("set_environment", {HOST_ID: host}) is None
    group = WeightGroup.create_master("127.0.0.1", len(joining) + 1, backend, timeout_s, torch.device(device))
    for rank, member in enumerate(joining, start=1):
        member.start("join", group.address, rank, len(joining) + 1, backend, timeout_s, torch.device(device))
    group.connect()
    for member in joining:
        assert member.result() is None
    return group


# ------------------------------------------------------------------------------------------- in the member's process


class Life:
    """The actions of a member; the methods are called by name."""

    group: WeightGroup

    def open(self, world_size: int, timeout_s: float) -> str:
        """Host a group's store, as the learner does."""
        self.group = WeightGroup.create_master("127.0.0.1", world_size, "gloo", timeout_s)
        return self.group.address

    def join(self, *args: object) -> None:
        self.group = WeightGroup.join(*args)

    def forge(self) -> None:
        """From now on it shows other ranks something else than who knows the group's keys."""
        process_group._proof = lambda *_: [1, 2]

    def set_environment(self, variables: dict[str, str]) -> None:
        os.environ.update(variables)

    def receive(self, manifest: Manifest, version: int, branch: int = 0, device: str = "cpu") -> Print:
        weights = self.receiver(manifest, device).receive(version, branch=branch)
        assert all(tensor.device.type == device for tensor in weights.values())
        return fingerprint(weights)

    def receiver(self, manifest: Manifest, device: str) -> WeightReceiver:
        memory_U = torch.empty(manifest.offsets[-1], dtype=torch.uint8, device=device)
        return WeightReceiver(self.group, manifest, memory_U)

    def receive_flipped(self, manifest: Manifest, version: int) -> Print:
        """Receive through a network that turns one bit around."""
        self.group._carrier = FlippingCarrier(self.group.carrier)
        return self.receive(manifest, version)

    def die_in_transfer(self, manifest: Manifest, version: int, bucket_bytes: int = 64) -> None:
        """Agree to the header, take one bucket of the sender's size, and be killed."""
        deadline = Deadline(self.group.timeout_s)
        agree(self.group, header_of(manifest, version), deadline)
        sizes = [bucket.stop - bucket.start for bucket in plan_buckets(manifest, bucket_bytes)[:2]]
        first, second = (torch.zeros(size, dtype=torch.uint8) for size in sizes)
        arriving = self.group.carrier.carry(first, deadline)
        self.group.carrier.carry(second, deadline)
        arriving.wait()
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


def header_of(manifest: Manifest, version: int, bucket_bytes: int = 0) -> Header:
    return Header(
        branch=0,
        version=version,
        manifest_digest=manifest.digest,
        stream_bytes=manifest.offsets[-1],
        bucket_bytes=bucket_bytes,
    )


@dataclass(frozen=True)
class FlippingCarrier:
    """Turns the lowest bit of each bucket's first byte around after it arrived."""

    carrier: Carrier

    def reaches(self, device: torch.device) -> bool:
        return self.carrier.reaches(device)

    def carry(self, bucket_U: torch.Tensor, deadline: Deadline) -> Transfer:
        return FlippedTransfer(self.carrier.carry(bucket_U, deadline), bucket_U)

    def close(self) -> None:
        self.carrier.close()


@dataclass(frozen=True)
class FlippedTransfer:
    arriving: Transfer
    bucket_U: torch.Tensor

    def wait(self) -> None:
        self.arriving.wait()
        self.bucket_U[0] ^= 1


def serve(pipe: Connection, kind: type) -> None:
    torch.set_num_threads(1)
    life = kind()
    while True:
        action, args = pipe.recv()
        began_s = time.monotonic()
        try:
            pipe.send(getattr(life, action)(*args))
        except WeightsError as error:
            pipe.send(Failed(str(error), time.monotonic() - began_s))
