"""The process group of the weights: rank 0, the learner or a worker with the version, sends to the others."""

from __future__ import annotations

import weakref
from hashlib import blake2b

import torch

from asyncdapo.errors import WeightsError
from asyncdapo.transport.backend import Backend, host_of
from asyncdapo.transport.carrier import BroadcastCarrier, Carrier, RelayCarrier, route_of
from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.process_group import ProcessGroup
from asyncdapo.transport.shared_memory import device_name, numbered

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
        self._own_device = numbered(device)
        self._carrier: Carrier | None = None
        super().__init__(address, rank, world_size, backend, timeout_s)

    def connect(self, deadline: Deadline | None = None) -> None:
        deadline = deadline or Deadline(self.timeout_s)
        super().connect(deadline)
        own = weakref.proxy(self)  # no cycle: an old group's buffers and threads must go at once
        self._carrier = BroadcastCarrier(own) if self.backend == "nccl" else self._relay(own, deadline)

    def close(self) -> None:
        super().close()
        if self._carrier:
            self._carrier.close()

    @property
    def carrier(self) -> Carrier:
        """There is one from `connect` on."""
        assert self._carrier is not None, "the group is not connected"
        return self._carrier

    def _relay(self, own: ProcessGroup, deadline: Deadline) -> RelayCarrier:
        """By way of the ranks' hosts. Memory is shared on the GPU that all ranks have, else on each host. Without `ipc`
        none is shared: every rank counts as a host."""
        if self.backend != "ipc":
            return RelayCarrier(own, route_of(self.rank, range(self.world_size)), HOST)
        name = device_name(self._own_device)
        hosts, devices = zip(*self.exchange_rows([_word(host_of(name)), _word(name)], deadline), strict=True)
        return RelayCarrier(own, route_of(self.rank, hosts), self._own_device if len(set(devices)) == 1 else HOST)


def _word(name: str) -> int:
    """Equal for equal names."""
    return int.from_bytes(blake2b(name.encode(), digest_size=7).digest())
