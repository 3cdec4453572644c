"""What the learner is sent of a batch: the headers of its groups, who trains on what, and where their records are.

In: groups as they move; a batch that was cut, with the places of its records. Out: its `Batch`, the same for every
rank, or a `NoBatch` that says which header can't be read. A batch that can't be read stays cut: only a rollback may
give it other members, since then every rank has ended. Tokens are not read here: a rank reads those of its share.
Memory: the headers of groups that may still be trained on, as far as they arrived at this process, and of the batch
that was made last, because other ranks ask for it. Headers of others are read from the segments.
Does not own: when a batch is sent (`dispatch`), how it is dealt (`asyncdapo.shares`).
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from asyncdapo.messages import Group
from asyncdapo.records.record import BadRecord, Place
from asyncdapo.replay.core.events import MoveGroup
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.schema import HELD_STATES
from asyncdapo.shares import Batch, Dealer, NoBatch, for_learner


class Headers:
    """Of the groups that may still be trained on, and the batches that are made of them."""

    def __init__(self, journal: Journal, dealer: Dealer) -> None:
        self._journal, self._dealer = journal, dealer
        self._held: dict[int, Group] = {}
        self._batch: Batch | None = None

    def move(self, action: MoveGroup, arrived: Group | None) -> None:
        """A group has a new state. `arrived`: what came with the event, this group or another one."""
        known = self._held.pop(action.group_id, None)
        if action.state in HELD_STATES:
            if known:
                self._held[action.group_id] = known
            elif arrived and arrived.lease_id == action.group_id:
                self._held[action.group_id] = for_learner(arrived)

    def batch(self, bare: Batch, places: Mapping[int, Place]) -> Batch | NoBatch:
        """`bare`: the batch without its groups. `places`: of their records, by `group_id`, in the batch's order. Call
        it in a thread, one call at a time."""
        last = self._batch
        if last and (last.step, last.branch) == (bare.step, bare.branch):
            return last
        try:
            groups = [self._held.get(group_id) or self._read(group_id, place) for group_id, place in places.items()]
        except BadRecord as bad:
            return NoBatch(step=bare.step, reason=f"batch {bare.step} can't be read back: {bad}", unreadable=True)
        self._batch = replace(bare, groups=groups, deal=self._dealer.deal(groups), places=list(places.values()))
        return self._batch

    def _read(self, group_id: int, place: Place) -> Group:
        return for_learner(self._journal.read_header(group_id, place))
