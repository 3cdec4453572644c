"""Leases: which workers are alive, which lease each of them runs, and what is saved of groups that aren't complete.

In: sessions that begin and end, credits, loaded versions, and the leases that the state grants and ends. Out:
`GrantLease` and `EndLease` actions, the worker for the next lease, and the leases that the staleness bound would end;
`SavePartial` and `DropPartial`.

Invariants: every lease used a credit of its worker, a `lease_id` is never reused, and a lease ends once. A group that
arrives after its lease has ended is late. What is saved of a prompt fits the next batch, and goes to one lease at a
time; it stays until the prompt has a group or an end, or is too old. Does not own: when a lease is granted
(`admission.py`), and what happens to the prompt after its lease has ended (`lifecycle.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from asyncdapo.replay.core.events import Action, DropPartial, EndLease, GrantLease, Partial, SavePartial
from asyncdapo.replay.core.recovery import Recovered
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
    continues: bool = True
    """Whether it continues what others have sampled in part."""


@dataclass(slots=True)
class Lease:
    """A lease that runs."""

    lease_id: int
    prompt_id: int
    worker: int
    started_version: int | None = None
    """Version that sampled its first token; None until then."""


class Partials:
    """What is saved of prompts: of those whose lease runs, and of those that wait."""

    def __init__(self, bound: StalenessBound, do: Callable[[Action], None], saved: Mapping[int, Partial]) -> None:
        self.saved = dict(saved)
        """By `prompt_id`."""
        self._bound, self._do = bound, do

    def num_tokens(self, prompt_id: int) -> int:
        """0 if nothing is saved of it."""
        return self.saved[prompt_id].num_tokens if prompt_id in self.saved else 0

    def save(self, prompt_id: int, lease_id: int, partial: Partial) -> None:
        self.saved[prompt_id] = partial
        self._do(SavePartial(prompt_id=prompt_id, lease_id=lease_id, partial=partial))

    def drop(self, prompt_id: int, reason: str) -> None:
        """What is saved of a prompt is lost; a lease of it has none of these tokens."""
        if partial := self.saved.pop(prompt_id, None):
            self._do(DropPartial(prompt_id=prompt_id, num_lost=partial.num_tokens, reason=reason))

    def drop_stale(self, step: int) -> None:
        """Drop what would miss the bound in batch `step`. Leases that it was given to have ended."""
        for prompt_id, partial in list(self.saved.items()):
            if not self._bound.fits(partial.min_version, step):
                self.drop(prompt_id, "stale")

    def release(self, prompt_id: int) -> None:
        """Its lease ends for good, and its tokens are accounted for with that."""
        if self.saved.pop(prompt_id, None):
            self._do(DropPartial(prompt_id=prompt_id, num_lost=0, reason=""))


class Leases:
    """Live workers and running leases."""

    def __init__(
        self,
        bound: StalenessBound,
        do: Callable[[Action], None],
        was: Recovered,
    ) -> None:
        """`do` takes the actions. `was`: what a former process knew. Workers report their credits again."""
        self.workers = {
            index: Worker(worker.loaded_version, continues=worker.continues) for index, worker in was.workers.items()
        }
        self.partials = Partials(bound, do, was.partials)
        self.running = {
            lease.lease_id: Lease(lease.lease_id, lease.prompt_id, lease.worker, lease.started_version)
            for lease in was.leases
        }
        self.num_granted = was.num_leases
        """Leases so far; also the last `lease_id`."""
        self.num_credits = 0
        """Leases that the workers could start now."""
        self._bound = bound
        self._do = do

    def join(self, worker: int, loaded_version: int, continues: bool) -> None:
        assert worker not in self.workers, f"worker {worker} joined twice"
        self.workers[worker] = Worker(loaded_version, continues=continues)

    def leave(self, worker: int, outcome: Outcome, reason: str) -> list[Lease]:
        """The worker is gone. Ends and returns the leases that it held."""
        held = [lease for lease in self.running.values() if lease.worker == worker]
        for lease in held:
            self.end(lease, outcome, reason, keep=True)
        self.num_credits -= self.workers.pop(worker).credits
        return held

    def note_ready(self, worker: int, credits: int, pace: float) -> None:
        its = self.workers[worker]
        self.num_credits += credits - its.credits
        its.credits, its.pace = credits, pace

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

    def grant(self, prompt_id: int, worker: int, attempt: int, step: int) -> None:
        """Grant a lease for one credit of the worker, for batch `step` at the earliest."""
        begun = self.partials.saved.get(prompt_id)
        if begun and not self._bound.fits(begun.min_version, step):
            self.partials.drop(prompt_id, "stale")
        if not self.workers[worker].continues:
            self.partials.drop(prompt_id, f"worker {worker} can't continue it")
        self.workers[worker].credits -= 1
        self.num_credits -= 1
        self.num_granted += 1
        lease = Lease(lease_id=self.num_granted, prompt_id=prompt_id, worker=worker)
        self.running[lease.lease_id] = lease
        self._do(
            GrantLease(
                lease_id=lease.lease_id,
                prompt_id=prompt_id,
                worker=worker,
                attempt=attempt,
                num_begun=self.partials.num_tokens(prompt_id),
            )
        )

    def save(self, lease_id: int, partial: Partial, step: int) -> None:
        """Save what is sampled of a lease, if it runs, and this fits batch `step`."""
        if lease_id in self.running and self._bound.fits(partial.min_version, step):
            self.partials.save(self.running[lease_id].prompt_id, lease_id, partial)

    def end(self, lease: Lease, outcome: Outcome, reason: str = "", *, keep: bool = False) -> None:
        """`keep`: what is saved stays for the prompt's next lease."""
        if not keep:
            self.partials.release(lease.prompt_id)
        del self.running[lease.lease_id]
        self._do(
            EndLease(
                lease_id=lease.lease_id,
                prompt_id=lease.prompt_id,
                worker=lease.worker,
                outcome=outcome,
                reason=reason,
                num_kept=self.partials.num_tokens(lease.prompt_id),
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

    @property
    def num_partial_tokens(self) -> int:
        """Saved of prompts that have no lease."""
        leased = {lease.prompt_id for lease in self.running.values()}
        return sum(partial.num_tokens for prompt_id, partial in self.partials.saved.items() if prompt_id not in leased)

    def _oldest_version(self, lease: Lease) -> int:
        """Lowest version that a token of the lease can have. Before its first token: that of the worker's weights."""
        own = self.workers[lease.worker].loaded_version if lease.started_version is None else lease.started_version
        begun = self.partials.saved.get(lease.prompt_id)
        return min(own, begun.min_version) if begun else own
