"""A learner in a process of its own (`members.Member`), which may fall silent or be killed in the middle of a
transfer."""

from __future__ import annotations

import os
import signal

from safetensors.torch import load_file

from asyncdapo.transport.backend import Backend
from asyncdapo.transport.deadline import Deadline
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.header import agree
from asyncdapo.weights.manifest import Manifest, plan_buckets
from asyncdapo.weights.sender import WeightSender
from tests.weights.members import header_of

BUCKET_BYTES = 1 << 14


class Trainer:
    """The actions; weights are files."""

    def host(self, world_size: int, backend: Backend, timeout_s: float, weights: str) -> tuple[str, Manifest]:
        """Open a group for `world_size` ends, and lay out these weights."""
        self.group = WeightGroup.create_master("127.0.0.1", world_size, backend, timeout_s)
        self.manifest = Manifest.of(load_file(weights))
        return self.group.address, self.manifest

    def accept(self) -> None:
        self.group.connect()
        self.sender = WeightSender(self.group, self.manifest, BUCKET_BYTES)

    def send(self, version: int, weights: str) -> float:
        """Returns the seconds that it took."""
        return self.sender.send(version, load_file(weights)).seconds

    def fall_silent(self, version: int) -> None:
        """Send the header and some buckets, then nothing; the process lives."""
        deadline = Deadline(self.group.timeout_s)
        agree(self.group, header_of(self.manifest, version, BUCKET_BYTES), deadline)
        first, second, *_ = plan_buckets(self.manifest, BUCKET_BYTES)
        buffers = [block.bytes_U for block in self.group.carrier.buffers(BUCKET_BYTES)]
        arriving = self.group.carrier.carry(buffers[0][: first.stop - first.start], deadline)
        self.group.carrier.carry(buffers[1][: second.stop - second.start], deadline)
        arriving.wait()

    def die(self, version: int) -> None:
        """As `fall_silent`, and be killed then."""
        self.fall_silent(version)
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self) -> None:
        self.group.close()
