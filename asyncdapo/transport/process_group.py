"""Process group: tensors between processes, separate from torch.distributed's default group.

So it can be closed and made again when the membership changes or a collective fails, and it can't clash with the groups
of an engine or a trainer in the same process. One sends weights to the rollout workers (`weights/group`), another sums
gradients over the learner's ranks (`learner/step/ranks`). Each names its purpose and the error that it raises.

In: an address from rank 0, which contains the group's keys. Out: broadcasts from rank 0, sums over all ranks, and words
that every rank sends to every other. Does not own: how the ranks find each other (`store`), what the bytes mean.

Invariants: over Gloo, no rank is in a group without its keys. Every call ends within its deadline, or when this rank
leaves; it returns or raises the group's error, and releases the GIL while it waits. A failed collective closes the
group. If the backend notices that (Gloo), the other ranks then fail at once, not at their deadlines.

Shapes: W ranks, N words.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from secrets import token_hex
from struct import unpack
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage] (torch documents them here)

from asyncdapo.errors import RunError
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.deadline import Deadline, in_thread
from asyncdapo.transport.shared_memory import numbered
from asyncdapo.transport.store import POLL_S, DistantStore, GroupStore, HostedStore, split_address

ROOT = 0
"""The rank that hosts the store and sends broadcasts."""
PROOFS_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""In which every rank has to show that it knows the group's keys, at each try to connect over Gloo."""
SALT = "salt"
LEAVE_S = 0.5
"""For Gloo to close its connections. It doesn't while a collective waits for a rank that is silent."""
WATCH_S, WATCH_LOOKS = 0.0001, 200
"""Pause between two polls of an NCCL collective, and number of polls before NCCL's own wait takes over."""


class ProcessGroup:
    """The process group of one membership. Create it with `create_master` or `join`.

    `device`: where tensors have to be. `closed`: whether the group can no longer be used. Under `ipc` this is a Gloo
    group, and a `carrier` uses shared memory beside it within a host.
    """

    purpose = "a process group"
    """What it is for, such as "the weights"; errors name it."""
    error: type[RunError] = RunError
    """The error that its calls raise."""

    def __init__(self, address: str, rank: int, world_size: int, backend: Backend, timeout_s: float) -> None:
        if world_size < 2 or not 0 <= rank < world_size:
            raise ValueError(f"a group has two ranks or more, counted from 0, got rank {rank} of {world_size}")
        self.rank, self.world_size, self.backend, self.timeout_s = rank, world_size, backend, timeout_s
        self.device = numbered(torch.device("cuda" if backend == "nccl" else "cpu"))
        self._group: Any = None
        """torch's ProcessGroupNCCL or ProcessGroupGloo, once connected. torch's stubs leave out their collectives."""
        self._store: GroupStore | None = None
        self._left: futures.Future[bool] = futures.Future()
        """Done once this rank has left the group."""
        deadline = Deadline(timeout_s)
        with self._translated("open the store", deadline):
            if rank == ROOT:
                self._store = HostedStore(address, timeout_s)
            else:
                self._store = DistantStore(address, timeout_s, deadline)
        self.address = self._store.address

    @classmethod
    def create_master(cls, host: str, world_size: int, backend: Backend, timeout_s: float, *own: Any) -> Self:
        """The group at rank 0. Returns at once, with an `address` for the others, who reach this machine as `host`.
        `connect` then waits for them. `own`: further arguments of a subclass."""
        return cls(host, ROOT, world_size, backend, timeout_s, *own)

    @classmethod
    def join(cls, address: str, rank: int, world_size: int, backend: Backend, timeout_s: float, *own: Any) -> Self:
        """The group at another rank. Blocks until every rank is there. Raises the group's error after `timeout_s`."""
        deadline = Deadline(timeout_s)
        group = cls(address, rank, world_size, backend, timeout_s, *own)
        group.connect(deadline)
        return group

    @property
    def closed(self) -> bool:
        return self._store is None

    def connect(self, deadline: Deadline | None = None) -> None:
        """Wait for every rank, then connect with them. The deadline is `timeout_s` from now unless it is given; the
        error then names the missing ranks. If a rank has died, another thread may close the group, and the call raises
        at once."""
        store = self._open_store()
        deadline = deadline or Deadline(self.timeout_s)
        with self._translated("join", deadline):
            store.put(_joined(self.rank), b"", deadline)
            everyone = [_joined(rank) for rank in range(self.world_size)]
            while None in (joined := store.look(everyone, deadline)):
                self._open_store()
                if deadline.passed:
                    missing = [rank for rank, answer in enumerate(joined) if answer is None]
                    self.close()
                    who = f"ranks {missing} of {self.world_size} did not join"
                    raise self.error(f"no group for {self.purpose} within {deadline.timeout_s:g} s: {who}")
                time.sleep(POLL_S)
        with self._translated("connect", deadline):
            self._group = _process_group(PrefixStore("group", store), self, deadline)

    def broadcast(self, tensor: torch.Tensor, deadline: Deadline) -> Collective:
        """Start to send `tensor` from rank 0, or to receive it in place elsewhere. At most two may run at once. Don't
        use the tensor until `Collective.wait` returns."""
        options = dist.BroadcastOptions()
        options.rootRank = ROOT
        options.timeout = deadline.left()
        with self._translated("start a broadcast", deadline):
            return Collective(self, self._open_group().broadcast([tensor], options), deadline)

    def all_reduce(self, tensor: torch.Tensor, deadline: Deadline) -> None:
        """Replace each rank's tensor by the sum of all, the same bits at every rank. Tensors must be contiguous, on
        `device`, and of the same shape and dtype at all ranks (not bool: Gloo can't add it)."""
        options = dist.AllreduceOptions()
        options.timeout = deadline.left()
        with self._translated("start a sum", deadline):
            work = self._open_group().allreduce([tensor], options)
        self.wait(work, deadline)

    def send(self, tensor: torch.Tensor, rank: int, deadline: Deadline) -> Collective:
        """Start to send `tensor` to one rank, over Gloo. Don't change it until `Collective.wait` returns. What one rank
        sends to another arrives in order."""
        with self._translated(f"start to send to rank {rank}", deadline):
            return Collective(self, self._open_group().send([tensor], rank, 0), deadline)

    def receive(self, tensor: torch.Tensor, rank: int, deadline: Deadline) -> Collective:
        """Start to fill `tensor` with the next one that this rank sends, of the same length, over Gloo."""
        with self._translated(f"start to receive from rank {rank}", deadline):
            return Collective(self, self._open_group().recv([tensor], rank, 0), deadline)

    def exchange(self, verdict: int, deadline: Deadline) -> list[int]:
        """Send an int64 to every rank. Returns the numbers of all, by rank."""
        return [verdict for [verdict] in self.exchange_rows([verdict], deadline)]

    def exchange_rows(self, words: Sequence[int], deadline: Deadline) -> list[list[int]]:
        """Send int64 words to every rank, the same number at each. Returns the words of all, by rank."""
        if self.backend == "nccl":  # which would first connect every two ranks
            table_WN = torch.zeros(self.world_size, len(words), dtype=torch.int64)
            table_WN[self.rank] = torch.tensor(words)
            table_WN = table_WN.to(self.device)
            self.all_reduce(table_WN, deadline)
            return table_WN.tolist()
        own_WN = torch.tensor(words).repeat(self.world_size, 1)
        with self._translated("start an exchange", deadline):
            table_WN, work = _start_swap(self._open_group(), own_WN, deadline)
        self.wait(work, deadline)
        return table_WN.tolist()

    def wait(self, work: dist.Work, deadline: Deadline) -> None:
        """Wait for a collective. If it fails or the deadline passes, close the group and raise its error.

        Gloo has the deadline in the collective's options too, and its wait for a silent rank can't be ended before."""
        with self._translated("transfer", deadline):
            if self.backend == "nccl":
                _watch(work)
                over = work.wait(deadline.left())
            else:
                ended = in_thread(work.wait, deadline.left())
                futures.wait({ended, self._left}, return_when=futures.FIRST_COMPLETED)
                over = ended.done() and ended.result()
            if not over:
                raise RuntimeError("it was ended")

    def close(self) -> None:
        """Leave the group. Running collectives fail, here and at the other ranks. Gloo closes its connections once
        nothing refers to a collective any more: don't keep an error's traceback."""
        group, store = self._group, self._store
        self._group, self._store = None, None
        if not self._left.done():
            self._left.set_result(False)
        if group is not None:
            groups = [group]
            del group  # the last reference is the thread's: it waits for what still runs
            aborted = in_thread(lambda: groups.pop().abort())
            futures.wait({aborted}, timeout=None if self.backend == "nccl" else LEAVE_S)
        if store is not None:
            store.close()

    def _open_store(self) -> GroupStore:
        if self._store is None:
            raise self.error(f"the group of {self.purpose} is closed")
        return self._store

    def _open_group(self) -> Any:
        if self._group is None:
            state = "is closed" if self.closed else "isn't connected yet"
            raise self.error(f"the group of {self.purpose} {state}")
        return self._group

    @contextmanager
    def _translated(self, doing: str, deadline: Deadline) -> Iterator[None]:
        """Turn errors of torch.distributed (all are RuntimeError) into the group's error."""
        try:
            yield
        except RuntimeError as error:
            # From Python 3.12 on, a traceback through this generator refers back to the error. That cycle would keep
            # the connections open, and the other ranks waiting, until the garbage collector runs.
            cause = error.with_traceback(None)
            if self._left.done():
                raise self.error(f"the group of {self.purpose} is closed") from cause
            self.close()
            reason = f"no end within {deadline.timeout_s:g} s" if deadline.passed else str(error).partition("\n")[0]
            raise self.error(f"rank {self.rank} of {self.world_size} could not {doing}: {reason}") from cause


def _watch(work: dist.Work) -> None:
    """Poll before NCCL's own wait does: it polls once a millisecond, and a bucket between two GPUs takes less."""
    for _ in range(WATCH_LOOKS):
        if work.is_completed():
            return
        time.sleep(WATCH_S)


@dataclass(frozen=True)
class Collective:
    """A running broadcast, or one rank's part of a tensor's way to another."""

    group: ProcessGroup
    work: dist.Work
    deadline: Deadline

    def wait(self) -> None:
        """Block until the tensor may be read or written again. Raises the group's error."""
        self.group.wait(self.work, self.deadline)


def _joined(rank: int) -> str:
    return f"joined/{rank}"


def _process_group(store: Store, group: ProcessGroup, deadline: Deadline) -> Any:
    if group.backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = deadline.left()
        with _blocking_waits():
            return dist.ProcessGroupNCCL(store, group.rank, group.world_size, options)
    return gloo_backend(store, group.rank, group.world_size, group.address, deadline.left())


def gloo_backend(store: Store, rank: int, world_size: int, address: str, timeout: timedelta) -> Any:
    """Connect the ranks that share this store, by the network interface that leads to `address`. Raises RuntimeError.

    While a group forms, Gloo takes whoever speaks its protocol for the rank whose turn it is. So the ranks show each
    other at once that they know the group's keys. If one can't, all leave and try again, as often as `PROOFS_S` says.
    """
    deadline, backend = Deadline(timeout.total_seconds()), cast(Any, None)
    for number, proof_s in enumerate(PROOFS_S, start=1):
        ours = PrefixStore(str(number), store)
        try:
            if rank == ROOT:
                ours.set(SALT, token_hex(16))
            backend = _connected(ours, rank, world_size, address, deadline)
            key = blake2b(ours.get(SALT), key=split_address(address)[1].secret).digest()
            _meet(backend, rank, world_size, key, proof_s)
        except RuntimeError as error:
            if backend:
                backend.abort()
            if isinstance(error, dist.DistStoreError) or deadline.passed or number == len(PROOFS_S):
                raise
        else:
            break
    backend._set_default_timeout(timeout)
    return backend


def _connected(store: Store, rank: int, world_size: int, address: str, deadline: Deadline) -> Any:
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue] (torch's stub has it as Options)
    options._timeout = deadline.left()
    options._devices = [_gloo_device(address)]
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def _meet(backend: Any, rank: int, world_size: int, key: bytes, proof_s: float) -> None:
    """Raise RuntimeError unless each of these ranks has shown each other one that it knows the key."""
    shown_WN = torch.tensor([_proof(key, rank, other) for other in range(world_size)])
    proofs = _swapped(backend, shown_WN, proof_s)
    if strangers := [other for other, proof in enumerate(proofs) if proof != _proof(key, other, rank)]:
        raise RuntimeError(f"a stranger is in the place of rank {strangers[0]}")
    _swapped(backend, shown_WN, 2 * proof_s)  # nobody else has met one: they would have left


def _proof(key: bytes, sender: int, receiver: int) -> list[int]:
    """What one rank shows another one: words that take the key of this try to make."""
    words = blake2b(f"{sender} {receiver}".encode(), key=key, digest_size=16).digest()
    return list(unpack("<2q", words))


def _swapped(backend: Any, own_WN: torch.Tensor, timeout_s: float) -> list[list[int]]:
    deadline = Deadline(timeout_s)
    table_WN, work = _start_swap(backend, own_WN, deadline)
    if not work.wait(deadline.left()):
        raise RuntimeError("it was ended")
    return table_WN.tolist()


def _start_swap(backend: Any, own_WN: torch.Tensor, deadline: Deadline) -> tuple[torch.Tensor, dist.Work]:
    """Start to send a row of int64 words to each rank, over Gloo. The rows that come here are those of the table, by
    rank, once the work is over."""
    table_WN = torch.zeros_like(own_WN)
    options = dist.AllToAllOptions()
    options.timeout = deadline.left()
    return table_WN, backend.alltoall_base(table_WN, own_WN, [], [], options)


@contextmanager
def _blocking_waits() -> Iterator[None]:
    """Make groups without NCCL's watchdog thread, which kills the whole process when a collective fails. With blocking
    waits the failure is raised by `wait`. NCCL reads the variable when a group is made; a trainer's own groups keep the
    user's setting."""
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
    """The network interface that leads to rank 0. By default Gloo takes the address of the machine's name, which on
    many machines is a loopback address that no other machine can reach. GLOO_SOCKET_IFNAME overrules both."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return dist.ProcessGroupGloo.create_default_device()
    host, port = split_address(address)[0].rsplit(":", 1)
    family, _, _, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return dist.ProcessGroupGloo.create_device(hostname=probe.getsockname()[0])
