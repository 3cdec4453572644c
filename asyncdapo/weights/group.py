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
    """One membership's group; its calls raise WeightsError. Connected, it has a `carrier` for the buckets."""

    purpose = "the weights"
    error = WeightsError

    carrier: Carrier

    def __init__(
        self,
        address: str,
        rank: int,
        world_size: int,
        backend: Backend,
        timeout_s: float,
        device: torch.device = HOST,
    ) -> None:
        """`device` is where this end keeps its weights."""
        super().__init__(address, rank, world_size, backend, timeout_s)
        self._own_device = numbered(device)

    def connect(self, deadline: Deadline | None = None) -> None:
        deadline = deadline or Deadline(self.timeout_s)
        super().connect(deadline)
        own = weakref.proxy(self)  # in a cycle the buffers and threads of an old group would last until some collection
        self.carrier = SharedCarrier(own, self._common_device(deadline)) if self.backend == "ipc" else GroupCarrier(own)

    def _common_device(self, deadline: Deadline) -> torch.device:
        """The GPU of all ends, or the host: every end comes to the same."""
        name = device_name(self._own_device).encode()
        words = self.exchange(int.from_bytes(blake2b(name, digest_size=7).digest()), deadline)
        return self._own_device if len(set(words)) == 1 else HOST
