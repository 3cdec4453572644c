"""The learner's ranks: every one has a share of the weights and of the completions, and they add up what they find.

In: numbers of one rank. Out: their sums over all ranks, the same bits at each, and the mesh on which weights are
sharded (`model/sharding`). `ALONE` is a learner of one rank: everything is the sum already, its mesh has one process.

Invariant: every rank makes the same calls in the same order, collectives of sharded passes included; which they are may
depend on a batch's headers and on what was summed before, never on a rank's own share. A call waits for the slowest
rank, at most `SYNC_TIMEOUT_S`, and raises RanksError when one is gone. Does not own: which rank gets what (`shares`),
who lives (`controller/fleet/ranks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from asyncdapo.errors import RanksError, RunError
from asyncdapo.learner.model.mesh import MeshGroup, is_of_collective, mesh_of_one
from asyncdapo.transport.deadline import Deadline

T = TypeVar("T")

SYNC_TIMEOUT_S = 1800.0
"""A rank waits for the slowest share of an update; nothing that a train step does takes longer."""


class GradientGroup(MeshGroup):
    """The process group of the ranks; rank 0 is the process that sends weights and writes checkpoints."""

    purpose = "the learner's ranks"
    error = RanksError


class Ranks:
    """One rank among `num_ranks`, which are replicas of `num_shards` consecutive ranks. With more than one rank it has
    to `join` a group before anything else."""

    def __init__(self, rank: int = 0, num_ranks: int = 1, num_shards: int = 1) -> None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} is none of {num_ranks}")
        if num_ranks % num_shards:
            raise ValueError(f"{num_ranks} ranks can't be replicas of {num_shards} shards")
        self.rank, self.num_ranks, self.num_shards = rank, num_ranks, num_shards
        self._group: GradientGroup | None = None
        self._mesh: DeviceMesh | None = None

    def join(self, group: GradientGroup) -> None:
        """Sum through this connected group from now on."""
        if (group.rank, group.world_size) != (self.rank, self.num_ranks):
            raise ValueError(f"rank {self.rank} of {self.num_ranks} can't be rank {group.rank} of {group.world_size}")
        self._group = group

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Replicas × shards, made at the first call, which every rank has to make. Raises RanksError."""
        if self.num_ranks == 1:
            return mesh_of_one(device)
        if self._mesh is None:
            self._mesh = self._open_group().mesh(device, self.num_shards, SYNC_TIMEOUT_S)
        return self._mesh

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, holding the sum over all ranks from now on. Of one shape and dtype (float or int) at all ranks,
        on any device. Raises RanksError when a rank is gone or late."""
        if self.num_ranks == 1:
            return tensor
        group = self._open_group()
        travelling = tensor.to(group.device).contiguous()
        group.all_reduce(travelling, Deadline(SYNC_TIMEOUT_S))
        if travelling is not tensor:
            tensor.copy_(travelling)
        return tensor

    def largest(self, number: int) -> int:
        """Of the numbers of all ranks. Raises RanksError when a rank is gone or late."""
        return max(self._exchange(number))

    def as_many(self, parts: Sequence[list[T]], *, at_least: int = 0) -> list[list[T]]:
        """The parts, and empty lists behind them: as many as the rank with the most has, and `at_least` so many. Passes
        of sharded weights are collectives, so every rank makes as many; the empty ones count nothing (`packing.IDLE`).
        Raises RanksError when a rank is gone or late."""
        number = max(self.largest(len(parts)), at_least)
        return [*parts, *([] for _ in range(number - len(parts)))]

    def check_same(self, digest: int | bytes, what: str) -> None:
        """Raises RunError at every rank unless the replicas of each shard have the same digest of `what`, RanksError
        when one is gone."""
        words = self._exchange(_word(digest))
        if others := [rank for rank, word in enumerate(words) if word != words[rank % self.num_shards]]:
            raise RunError(f"the learner's ranks {others} have other {what} than rank {others[0] % self.num_shards}")

    @contextmanager
    def together(self, doing: str, in_step_after: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Around sharded passes and other collectives of PyTorch's: raises RanksError where one fails because a rank is
        gone or late. Whatever ends it, this rank leaves the group, so that none waits for it; except an error of which
        the other ranks are told (`in_step_after`)."""
        try:
            yield
        except Exception as error:
            if self._group is None or isinstance(error, in_step_after):
                raise
            self._group.close()
            if not is_of_collective(error):
                raise
            # A traceback would keep tensors, and connections, from being freed.
            reason, cause = str(error).partition("\n")[0], error.with_traceback(None)
            raise RanksError(f"rank {self.rank} of {self.num_ranks} could not {doing}: {reason}") from cause

    def _exchange(self, number: int) -> list[int]:
        """The numbers of all ranks, by rank."""
        if self.num_ranks == 1:
            return [number]
        return self._open_group().exchange(number, Deadline(SYNC_TIMEOUT_S))

    def _open_group(self) -> GradientGroup:
        if self._group is None:
            raise RanksError(f"rank {self.rank} of {self.num_ranks} has joined no group yet")
        return self._group


ALONE = Ranks()
"""A learner of one process."""


def _word(digest: int | bytes) -> int:
    """63 bits of it, which fit an int64."""
    data = digest if isinstance(digest, bytes) else str(digest).encode()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> 1
