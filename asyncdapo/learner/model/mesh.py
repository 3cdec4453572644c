"""Mesh: the ranks of a process group as replicas × shards, which PyTorch's FSDP2 and DTensor compute on.

    rank   0 1 2 3 │ 4 5 6 7        4 shards, 2 replicas: consecutive ranks are the shards of one replica
           replica 0   replica 1

In: a connected group and the number of shards. Out: a `DeviceMesh`; one process without a group is a mesh of one. A
mesh needs torch's default group, so a process has one mesh at a time, and the last one counts. Invariants: its
connections take the same way as the group's, and find each other by its store; closing the group ends its collectives
too. A rank that is gone fails the others' collectives, with an error that `is_of_collective` knows. Does not own: what
is sharded (`sharding`), who the ranks are (`step/ranks`).
"""

from __future__ import annotations

from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import (
    HashStore,  # pyright: ignore[reportPrivateImportUsage] (torch documents them here)
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.process_group import ProcessGroup, gloo_backend

REPLICAS, SHARDS = "replicas", "shards"
_numbers = count()
"""torch keeps the name of every backend for ever."""


class MeshGroup(ProcessGroup):
    """A process group whose ranks may be a mesh."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._of_mesh: list[Any] = []
        """Backends of the mesh."""

    def mesh(self, device: torch.device, num_shards: int, timeout_s: float) -> DeviceMesh:
        """Replicas × shards of this device's kind, whose collectives take `timeout_s` at most. Every rank has to call
        it, once it is connected; a mesh that this process had before ends. Raises the group's error."""
        with self._translated("make a mesh", Deadline(timeout_s)):
            _leave_default_group()
            name, store, timeout = f"mesh_of_ranks_{next(_numbers)}", self._open_store(), timedelta(seconds=timeout_s)
            dist.Backend.register_backend(name, self._make_gloo, extended_api=True, devices=["cpu", "cuda"])
            backend = f"cpu:{name},cuda:nccl" if self.backend == "nccl" else name
            prefix = PrefixStore(f"mesh/{len(self._of_mesh)}", store)  # the same at every rank, unlike the name
            dist.init_process_group(backend, store=prefix, rank=self.rank, world_size=self.world_size, timeout=timeout)
            return _mesh(device, self.world_size // num_shards, num_shards)

    def close(self) -> None:
        super().close()
        for backend in self._of_mesh:
            backend.abort()

    def _make_gloo(self, options: Any, _: Any) -> dist.Backend:
        """torch calls it for the default group, and for the row and the column of the mesh that this rank is in."""
        backend = gloo_backend(options.store, options.group_rank, options.group_size, self.address, options.timeout)
        self._of_mesh.append(backend)
        return backend


def mesh_of_one(device: torch.device) -> DeviceMesh:
    """This process alone."""
    if not dist.is_initialized() or dist.get_world_size() > 1:
        _leave_default_group()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return _mesh(device, 1, 1)


def is_of_collective(error: BaseException) -> bool:
    """Whether a collective failed, since a rank is gone or late. Gloo's errors are known by their words alone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _mesh(device: torch.device, num_replicas: int, num_shards: int) -> DeviceMesh:
    return init_device_mesh(device.type, (num_replicas, num_shards), mesh_dim_names=(REPLICAS, SHARDS))


def _leave_default_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
