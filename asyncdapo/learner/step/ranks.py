"""The learner's ranks: every one holds all weights and its share of the groups, and they add up what they find.

In: tensors and gradients of one rank. Out: their sums over all ranks, the same bits at each: so weights that were equal
stay equal. `ALONE` is a learner of one rank: everything is the sum already, and there is no process group.

Invariant: every rank makes the same calls in the same order; which they are may depend on a batch's headers and on what
was summed before, never on a rank's own share. A call waits for the slowest rank, at most `SYNC_TIMEOUT_S`, and raises
RanksError when one is gone. Does not own: which rank gets what (`shares`), who lives (`controller/fleet/ranks`).

Shape: U elements of many gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from asyncdapo.errors import RanksError, RunError
from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.process_group import ProcessGroup

SYNC_TIMEOUT_S = 1800.0
"""A rank waits for the slowest share of an update; nothing that a train step does takes longer."""
BUCKET_BYTES = 64 << 20
"""Most bytes of gradients that are copied together and summed at once."""


class GradientGroup(ProcessGroup):
    """The process group of the ranks; rank 0 is the process that sends weights and writes checkpoints."""

    purpose = "the learner's ranks"
    error = RanksError


class Ranks:
    """One rank among `num_ranks`. With more than one it has to `join` a group before anything is summed."""

    def __init__(self, rank: int = 0, num_ranks: int = 1) -> None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} is none of {num_ranks}")
        self.rank, self.num_ranks = rank, num_ranks
        self._group: ProcessGroup | None = None

    def join(self, group: ProcessGroup) -> None:
        """Sum through this connected group from now on."""
        if (group.rank, group.world_size) != (self.rank, self.num_ranks):
            raise ValueError(f"rank {self.rank} of {self.num_ranks} can't be rank {group.rank} of {group.world_size}")
        self._group = group

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

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """`.grad` of each parameter becomes the sum over all ranks. None counts as zeros, and is zeros afterwards: a
        rank without a share has no gradient, and takes part all the same. Raises RanksError."""
        gradients = []
        for parameter in parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = grad.contiguous()
            gradients.append(parameter.grad.view(-1))
        if self.num_ranks == 1:
            return
        for pieces in _buckets(gradients):
            flat_U = self.sum(torch.cat(pieces))
            for piece, summed in zip(pieces, flat_U.split([len(piece) for piece in pieces]), strict=True):
                piece.copy_(summed)

    def check_same(self, digest: int | bytes, what: str) -> None:
        """Raises RunError at every rank unless all have the same digest of `what`, RanksError when one is gone."""
        if self.num_ranks == 1:
            return
        words = self._open_group().exchange(_word(digest), Deadline(SYNC_TIMEOUT_S))
        if others := [rank for rank, word in enumerate(words) if word != words[0]]:
            raise RunError(f"the learner's ranks {others} have other {what} than rank 0")

    def _open_group(self) -> ProcessGroup:
        if self._group is None:
            raise RanksError(f"rank {self.rank} of {self.num_ranks} has joined no group yet")
        return self._group


ALONE = Ranks()
"""A learner of one process."""


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Flat gradients in order, in lists of one dtype and at most `BUCKET_BYTES`; a larger one is cut."""
    bucket: list[Tensor] = []
    num_bytes = 0
    for gradient in gradients:
        for piece in gradient.split(BUCKET_BYTES // gradient.itemsize):
            if bucket and (num_bytes + piece.nbytes > BUCKET_BYTES or piece.dtype != bucket[0].dtype):
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append(piece)
            num_bytes += piece.nbytes
    if bucket:
        yield bucket


def _word(digest: int | bytes) -> int:
    """63 bits of it, which fit an int64."""
    data = digest if isinstance(digest, bytes) else str(digest).encode()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> 1
