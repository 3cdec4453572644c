"""Leases: which workers are alive, and which lease each of them runs.

In: sessions that begin and end, credits, loaded versions, and the leases that the state grants and ends. Out:
`GrantLease` and `EndLease` actions, the worker for the next lease, and the leases that the staleness bound would end.

Invariants: every lease used a credit of its worker, a `lease_id` is never reused, and a lease ends once. A group that
arrives after its lease has ended is late. Does not own: when a lease is granted (`admission.py`), and what happens to
the prompt after its lease has ended (`lifecycle.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from asyncdapo.replay.core.events import Action, EndLease, GrantLease
from asyncdapo.replay.core.recovery import KnownWorker, OpenLease
from asyncdapo.replay.core.staleness import StalenessBound

Outcome = Literal["done", "withdrawn", "lost", "rejected", "failed"]


@dataclass(slots=True)
class Worker:
    """A rollout worker whose session is alive."""

    loaded_version: int
    credits: int = 0
    """Leases that it can start now."""
    pace: float = 1.0
    """How fast it samples a sequence, as a share of the mean of all."""


@dataclass(slots=True)
class Lease:
    """A lease that runs."""

    lease_id: int
    prompt_id: int
    worker: int
    started_version: int | None = None
    """Version that sampled its first token; None until then."""


class Leases:
    """Live workers and running leases."""

    def __init__(
        self,
        bound: StalenessBound,
        do: Callable[[Action], None],
        *,
        workers: Mapping[int, KnownWorker],
        running: Iterable[OpenLease],
        num_granted: int,
    ) -> None:
        """`do` takes the actions. The other arguments come from a former process; workers report their credits
        again."""
        self.workers = {index: Worker(worker.loaded_version) for index, worker in workers.items()}
        self.running = {
            lease.lease_id: Lease(lease.lease_id, lease.prompt_id, lease.worker, lease.started_version)
            for lease in running
        }
        self.num_granted = num_granted
        """Leases so far; also the last `lease_id`."""
        self._bound = bound
        self._do = do

    @property
    def num_credits(self) -> int:
        """Leases that the workers could start now."""
        return sum(worker.credits for worker in self.workers.values())

    def join(self, worker: int, loaded_version: int) -> None:
        assert worker not in self.workers, f"worker {worker} joined twice"
        self.workers[worker] = Worker(loaded_version)

    def leave(self, worker: int, outcome: Outcome, reason: str) -> list[Lease]:
        """The worker is gone. Ends and returns the leases that it held."""
        held = [lease for lease in self.running.values() if lease.worker == worker]
        for lease in held:
            self.end(lease, outcome, reason)
        del self.workers[worker]
        return held

    def note_ready(self, worker: int, credits: int, pace: float) -> None:
        self.workers[worker].credits, self.workers[worker].pace = credits, pace

    def start(self, lease_id: int, version: int) -> None:
        if lease_id in self.running:
            self.running[lease_id].started_version = version

    def worker_for_next(self, step: int) -> int | None:
        """The worker with most credits for its pace, of those whose weights fit batch `step`: while leases are scarce,
        each gets its share by what it does in the same time. Ties go to the newest weights, then to the lowest index.
        None if no worker has a credit and weights that fit."""
        able = [
            (worker.credits * worker.pace, worker.loaded_version, -index)
            for index, worker in self.workers.items()
            if worker.credits > 0 and self._bound.fits(worker.loaded_version, step)
        ]
        return -max(able)[2] if able else None

    def grant(self, prompt_id: int, worker: int, attempt: int) -> None:
        """Grant a lease for one credit of the worker."""
        self.workers[worker].credits -= 1
        self.num_granted += 1
        lease = Lease(lease_id=self.num_granted, prompt_id=prompt_id, worker=worker)
        self.running[lease.lease_id] = lease
        self._do(GrantLease(lease_id=lease.lease_id, prompt_id=prompt_id, worker=worker, attempt=attempt))

    def end(self, lease: Lease, outcome: Outcome, reason: str = "") -> None:
        del self.running[lease.lease_id]
        self._do(
            EndLease(
                lease_id=lease.lease_id, prompt_id=lease.prompt_id, worker=lease.worker, outcome=outcome, reason=reason
            )
        )

    def end_if_running(self, lease_id: int, outcome: Outcome, reason: str = "") -> Lease | None:
        """Apply the answer to a lease: end the lease, or report the answer as late if it has ended already."""
        lease = self.running.get(lease_id)
        if lease is None:
            self._do(EndLease(lease_id=lease_id, prompt_id=None, worker=None, outcome="late"))
            return None
        self.end(lease, outcome, reason)
        return lease

    def overdue(self, step: int) -> list[Lease]:
        """Running leases whose group would miss the bound in batch `step`."""
        return [lease for lease in self.running.values() if not self._bound.fits(self._oldest_version(lease), step)]

    def _oldest_version(self, lease: Lease) -> int:
        """Lowest version that a token of the lease can have. Before its first token: that of the worker's weights."""
        if lease.started_version is not None:
            return lease.started_version
        return self.workers[lease.worker].loaded_version
