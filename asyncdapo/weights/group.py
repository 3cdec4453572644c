"""The process group of the weights: rank 0 is the learner, ranks 1 … N are the receivers."""

from __future__ import annotations

import weakref
from hashlib import blake2b

import torch

from asyncdapo.errors import WeightsError
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.carrier import Carrier, GroupCarrier, SharedCarrier
from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.process_group import ProcessGroup, device_name, numbered

HOST = torch.device("cpu")


class WeightGroup(ProcessGroup):
    """The group of one membership; its calls raise WeightsError. Once connected, it has a `carrier` for the buckets."""

    purpose = "the weights"
    error = WeightsError

    def __init__(
        self,
        address: str,
        rank: int,
        world_size: int,
        backend: Backend,
        timeout_s: float,
        device: torch.device = HOST,
    ) -> None:
        """`device`: where this rank keeps its weights."""
        super().__init__(address, rank, world_size, backend, timeout_s)
        self._own_device = numbered(device)
        self._carrier: Carrier | None = None

    def connect(self, deadline: Deadline | None = None) -> None:
        deadline = deadline or Deadline(self.timeout_s)
        super().connect(deadline)
        own = weakref.proxy(self)  # no cycle: an old group's buffers and threads must go at once
        shared = self.backend == "ipc"
        self._carrier = SharedCarrier(own, self._common_device(deadline)) if shared else GroupCarrier(own)

    @property
    def carrier(self) -> Carrier:
        """There is one from `connect` on."""
        assert self._carrier is not None, "the group is not connected"
        return self._carrier

    def _common_device(self, deadline: Deadline) -> torch.device:
        """The GPU that all ranks share, else the host. Every rank finds the same."""
        name = device_name(self._own_device).encode()
        words = self.exchange(int.from_bytes(blake2b(name, digest_size=7).digest()), deadline)
        return self._own_device if len(set(words)) == 1 else HOST
