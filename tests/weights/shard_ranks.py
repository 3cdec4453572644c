"""A rank of a sharded learner in a process of its own (`members.Member`): rank 0 sends, the others give their shards.
One may be killed, or stopped, in the middle of a transfer."""

from __future__ import annotations

import os
import signal
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from asyncdapo.errors import RanksError, WeightsError
from asyncdapo.learner.model.mesh import SHARDS
from asyncdapo.learner.step.ranks import GradientGroup, Ranks
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.shared_memory import Block
from asyncdapo.weights import shards
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.sender import Gather, WeightSender
from asyncdapo.weights.shards import Copies, Giver, Shards
from tests.learner.tiny import make_batch, make_learner
from tests.learner.tiny import train as train_step
from tests.weights.members import Print, fingerprint

BUCKET_BYTES = 1024
JOIN_TIMEOUT_S = 20.0


def weights_of(version: int) -> dict[str, torch.Tensor]:
    """Of any dtype and size: more and fewer rows than shards, none, rows longer than a bucket."""
    draw = torch.Generator().manual_seed(version)
    normal = torch.randn(64, 33, generator=draw)
    return {
        "embed": torch.randn(401, 7, generator=draw),
        "one row": torch.randn(1, 700, generator=draw),
        "bias": torch.randn(5, generator=draw),
        "bf16": normal.to(torch.bfloat16),
        "int8": torch.arange(-100, 101, dtype=torch.int8) + version,
        "flags": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "cube": torch.randn(3, 5, 7, generator=draw),
    }


class ShardRank:
    """The actions. Weights are those of `weights_of`, of a file, or a learner's."""

    def open(self, num_ranks: int) -> str:
        """At rank 0: open the store of the ranks' group. Returns its address."""
        self.ranks_group = GradientGroup.create_master("127.0.0.1", num_ranks, "gloo", JOIN_TIMEOUT_S)
        return self.ranks_group.address

    def join(self, address: str, rank: int, num_ranks: int, num_shards: int) -> None:
        if rank:
            self.ranks_group = GradientGroup.join(address, rank, num_ranks, "gloo", JOIN_TIMEOUT_S)
        else:
            self.ranks_group.connect()
        self.ranks = Ranks(rank, num_ranks, num_shards)
        self.ranks.join(self.ranks_group)
        self.giver: Giver | None = None
        self.make(0)

    def move_away(self) -> None:
        """From now on it can't map memory of the other ranks, as if it were on another machine."""

        def open_block(*_: Any) -> Block:
            raise OSError("there is no such process")

        shards.open_block = open_block

    def slow_down(self) -> None:
        """From now on every copy takes a while."""
        run = Copies.run

        def run_late(*args: Any) -> None:
            time.sleep(0.01)
            run(*args)

        Copies.run = run_late

    def make(self, version: int) -> None:
        """From now on its weights are its shards of those of this version."""
        self._divide(weights_of(version))

    def take(self, weights: str) -> None:
        """From now on its weights are its shards of those of this file."""
        self._divide(load_file(weights))

    def _divide(self, whole: dict[str, torch.Tensor]) -> None:
        mesh = self.ranks.mesh(torch.device("cpu"))
        hybrid = self.ranks.num_ranks > self.ranks.num_shards
        mesh, placements = (mesh, [Replicate(), Shard(0)]) if hybrid else (mesh[SHARDS], [Shard(0)])
        self.shards: dict[str, DTensor] = {
            name: distribute_tensor(one, mesh, placements, src_data_rank=None) for name, one in whole.items()
        }

    def load(self, path: str) -> None:
        """From now on its weights are a learner's."""
        self.learner = make_learner(path, ranks=self.ranks, updates_per_step=2)
        self.shards = self.learner.shards()

    def train(self, step: int) -> Print:
        """Train a step. Returns what whole weights are then."""
        train_step(self.learner, *make_batch(step, seed=step))
        return fingerprint(self.learner.weights())

    def host(self, world_size: int, backend: Backend, timeout_s: float) -> tuple[str, Manifest]:
        """At rank 0: open a group for so many ends of a transfer."""
        self.group = WeightGroup.create_master("127.0.0.1", world_size, backend, timeout_s)
        return self.group.address, self.manifest()

    def manifest(self) -> Manifest:
        return Manifest.of(self.shards)

    def accept(self) -> None:
        self.group.connect()
        self.sender = WeightSender(self.group, self.manifest(), BUCKET_BYTES, Shards(self.shards))

    def send(self, version: int) -> str:
        """Returns why the ranks lost each other, or nothing. The receivers then fail, as they do where the controller
        closes the group."""
        try:
            with self.ranks.together("send", in_step_after=WeightsError):
                self.sender.send(version, self.shards)
        except RanksError as error:
            self.group.close()
            return str(error)
        return ""

    def give(self, timeout_s: float) -> bool | str:
        """Whether all was given, or why the ranks lost each other."""
        try:
            with self.ranks.together("give"):
                self.giver = self.giver or Giver(Shards(self.shards), self.manifest(), BUCKET_BYTES)
                return self.giver.give(self.shards, timeout_s)
        except RanksError as error:
            return str(error)

    def die_in_give(self, timeout_s: float, signal_: int, stopped: str) -> None:
        """Give two parts, and be killed or stopped then."""
        giver = Giver(Shards(self.shards), self.manifest(), BUCKET_BYTES)
        giver._parts = giver._parts[:2]
        giver.give(self.shards, timeout_s)
        Path(stopped).touch()
        os.kill(os.getpid(), signal_)

    def die_in_send(self, version: int) -> None:
        """Say that buckets are wanted, take two, and be killed then."""
        fill, num_filled = Gather.fill, count()

        def fill_or_die(*args: Any) -> None:
            if next(num_filled) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            fill(*args)

        Gather.fill = fill_or_die
        self.sender.send(version, self.shards)
