"""Process group of the weights: rank 0 is the learner, ranks 1 … N are the receivers.

It stands apart from torch.distributed's default group, so that it can be closed and made anew when the membership
changes or a transfer has failed, and so that it can't clash with what an engine or a trainer sets up in its process.

In: an address that the learner hands out. Out: broadcasts from rank 0, and verdicts that every rank learns of every
other. Does not own: what the bytes mean (`sender`, `receiver`).

Invariants: every call ends within its deadline, by returning or by WeightsError; calls release the GIL while they wait;
a group in which a collective failed is closed, which lets the other ranks fail at once instead of at their deadlines.

Shape: W ranks.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from asyncdapo.errors import WeightsError
from asyncdapo.weights.backend import CPU, Backend

LEARNER_RANK = 0
JOIN_POLL_S = 0.02


class Deadline:
    """A moment after which a transfer has failed, shared by all its steps."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    def left(self) -> timedelta:
        """Time left, at least a millisecond (torch reads 0 as no limit in places)."""
        return timedelta(seconds=max(self._end_s - time.monotonic(), 0.001))

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self._end_s


class WeightGroup:
    """One membership's process group, made by `create_master` and `join`.

    `device` is where broadcast tensors have to be. `closed` tells whether the group can still be used.
    """

    def __init__(self, address: str, rank: int, world_size: int, backend: Backend, timeout_s: float) -> None:
        if world_size < 2 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} is no member of a group of two or more")
        self.rank, self.world_size, self.backend, self.timeout_s = rank, world_size, backend, timeout_s
        self.device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
        self._host, port = address.rsplit(":", 1)
        self._group: dist.Backend | None = None
        self._left = False
        with self._translated("open the store", Deadline(timeout_s)):
            self._store: dist.Store | None = dist.TCPStore(
                self._host,
                int(port),
                is_master=rank == LEARNER_RANK,
                timeout=timedelta(seconds=timeout_s / 2),  # it tries twice where nobody listens
                wait_for_workers=False,
            )
            self.address = f"{self._host}:{self._store.port}"

    @classmethod
    def create_master(cls, host: str, world_size: int, backend: Backend, timeout_s: float) -> WeightGroup:
        """The learner's end. Returns at once with an `address` for the others, who reach this machine as `host`;
        `connect` then waits for them."""
        return cls(f"{host}:0", LEARNER_RANK, world_size, backend, timeout_s)

    @classmethod
    def join(cls, address: str, rank: int, world_size: int, backend: Backend, timeout_s: float) -> WeightGroup:
        """A receiver's end: blocks until every rank is there. Raises WeightsError after `timeout_s`."""
        deadline = Deadline(timeout_s)
        group = cls(address, rank, world_size, backend, timeout_s)
        group.connect(deadline)
        return group

    @property
    def closed(self) -> bool:
        return self._store is None

    def connect(self, deadline: Deadline | None = None) -> None:
        """Wait for every rank, then connect with them. Raises WeightsError that names who is missing at the deadline,
        `timeout_s` from now unless it is given, or at once when another thread closes the group meanwhile: a rank that
        has died will not join."""
        store = self._open_store()
        deadline = deadline or Deadline(self.timeout_s)
        with self._translated("join", deadline):
            store.set(_joined(self.rank), "")
            while not store.check([_joined(rank) for rank in range(self.world_size)]):
                self._open_store()
                if deadline.passed:
                    missing = self._missing_ranks(store)
                    self.close()
                    raise WeightsError(f"no group for the weights within {self.timeout_s:g} s: {missing}")
                time.sleep(JOIN_POLL_S)
        with self._translated("connect", deadline):
            self._group = _process_group(dist.PrefixStore("weights", store), self, deadline)

    def broadcast(self, tensor: torch.Tensor, deadline: Deadline) -> Broadcast:
        """Start to send `tensor` from the learner, or to receive it in place elsewhere; at most two may be under way.
        The tensor must stay as it is until `Broadcast.wait` returns."""
        options = dist.BroadcastOptions()
        options.rootRank = LEARNER_RANK
        options.timeout = deadline.left()
        with self._translated("start a broadcast", deadline):
            return Broadcast(self, self._open_group().broadcast([tensor], options), deadline)

    def exchange(self, verdict: int, deadline: Deadline) -> list[int]:
        """Every rank's verdict, in the order of ranks, at every rank."""
        verdicts_W = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        verdicts_W[self.rank] = verdict
        options = dist.AllreduceOptions()
        options.timeout = deadline.left()
        with self._translated("exchange verdicts", deadline):
            work = self._open_group().allreduce([verdicts_W], options)
        self.wait(work, deadline)
        return verdicts_W.tolist()

    def wait(self, work: dist.Work, deadline: Deadline) -> None:
        """Wait for a collective. Raises WeightsError, and closes the group, when it fails or the deadline passes.

        Gloo has the deadline from the collective's options as well; NCCL only from here."""
        with self._translated("transfer", deadline):
            work.wait(deadline.left())

    def close(self) -> None:
        """Leave the group; collectives under way fail, here and at the other ranks."""
        group, self._group, self._store, self._left = self._group, None, None, True
        if group is not None:
            group.abort()

    def _open_store(self) -> dist.Store:
        if self._store is None:
            raise WeightsError("the group of the weights is closed")
        return self._store

    def _open_group(self) -> dist.Backend:
        if self._group is None:
            raise WeightsError("the group of the weights is closed" if self.closed else "the group isn't connected yet")
        return self._group

    def _missing_ranks(self, store: dist.Store) -> str:
        try:
            missing = [rank for rank in range(self.world_size) if not store.check([_joined(rank)])]
        except dist.DistError:
            return "the learner, which keeps its store, is gone"
        return f"ranks {missing} of {self.world_size} did not join" if missing else "the last rank joined too late"

    @contextmanager
    def _translated(self, doing: str, deadline: Deadline) -> Iterator[None]:
        """The one place where errors of torch.distributed (all are RuntimeError) become ours."""
        try:
            yield
        except RuntimeError as error:
            if self._left:
                raise WeightsError("the group of the weights is closed") from error
            self.close()
            reason = f"no end within {self.timeout_s:g} s" if deadline.passed else str(error).partition("\n")[0]
            raise WeightsError(f"rank {self.rank} of {self.world_size} could not {doing}: {reason}") from error


@dataclass(frozen=True)
class Broadcast:
    """A broadcast under way."""

    group: WeightGroup
    work: dist.Work
    deadline: Deadline

    def wait(self) -> None:
        """Block until the tensor may be read or written again. Raises WeightsError."""
        self.group.wait(self.work, self.deadline)


def device_name(device: torch.device) -> str:
    """`cpu`, or a name of the GPU that is the same in every process and unlike any other GPU's."""
    if device.type == "cpu":
        return CPU
    return f"cuda {torch.cuda.get_device_properties(device).uuid}"


def _joined(rank: int) -> str:
    return f"joined/{rank}"


def _process_group(store: dist.Store, group: WeightGroup, deadline: Deadline) -> dist.Backend:
    if group.backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = deadline.left()
        with _blocking_waits():
            return dist.ProcessGroupNCCL(store, group.rank, group.world_size, options)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = deadline.left()
    options._devices = [_gloo_device(group.address)]
    return dist.ProcessGroupGloo(store, group.rank, group.world_size, options)


@contextmanager
def _blocking_waits() -> Iterator[None]:
    """NCCL's watchdog thread ends the whole process when a collective fails. A group made with blocking waits has none:
    the failure is raised where it is waited for. The variable is read when a group is made; those of a trainer keep
    what the user set."""
    key = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _gloo_device(address: str) -> dist.ProcessGroupGloo.Device:
    """The network interface that leads to the learner. By itself Gloo takes the address that the machine's name
    resolves to, on many machines a loopback address that no other can reach. GLOO_SOCKET_IFNAME overrules both."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return dist.ProcessGroupGloo.create_default_device()
    host, port = address.rsplit(":", 1)
    family, _, _, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return dist.ProcessGroupGloo.create_device(hostname=probe.getsockname()[0])
