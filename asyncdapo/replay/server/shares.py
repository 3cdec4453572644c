"""What a rank of the learner is sent of a batch: all headers, and the payload of its share.

In: a batch that was cut, and the places of its groups. Out: its `Batch` message with the frames of the share, or a
`NoBatch` that says what can't be read. A batch that can't be read stays cut: only a rollback may give it other members,
since then every rank has ended. Called in a thread, one call at a time.
Memory: the headers of the batch that was read last, because other ranks ask for it; of the groups that
may still be trained on, as many as have room in `ServerSettings.recent_bytes`: few are read from the disk. A share is
not copied: a frame above 32 MiB would be in fresh pages at both ends each time.
Does not own: when a batch is sent (`dispatch`), who trains on what (`asyncdapo.shares`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from asyncdapo.messages import Group
from asyncdapo.replay.core.events import MoveGroup
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.payloads import BadRecord, Place
from asyncdapo.replay.ledger.schema import HELD_STATES
from asyncdapo.replay.server.settings import ServerSettings
from asyncdapo.shares import Batch, NoBatch, for_learner, frames_of, share_of
from asyncdapo.transport.codec import Buffer
from asyncdapo.transport.payload import Payload

Share = tuple[Batch | NoBatch, Sequence[Buffer]]


class RecentGroups:
    """Groups with their tokens that arrived at this process and may still be trained on, as many as there is room."""

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._groups: dict[int, tuple[Group, Payload]] = {}

    def move(self, action: MoveGroup, arrived: tuple[Group, Payload] | None) -> None:
        """A group has a new state. `arrived`: what came with the event, this group or another one."""
        if known := self._groups.pop(action.group_id, None):
            self._left += known[1].num_bytes
        elif arrived and arrived[0].lease_id == action.group_id:
            known = arrived
        if known and action.state in HELD_STATES and known[1].num_bytes <= self._left:
            self._groups[action.group_id] = known
            self._left -= known[1].num_bytes

    def get(self, group_id: int) -> tuple[Group, Payload] | None:
        """None of a group that isn't here. Any thread may call it."""
        return self._groups.get(group_id)


class ShareReader:
    """Makes shares of what has arrived, or of what the segments have."""

    def __init__(self, journal: Journal, settings: ServerSettings) -> None:
        self._journal, self._dealer = journal, settings.dealer
        self._batch: Batch | None = None
        self.recent = RecentGroups(settings.recent_bytes)

    def read(self, bare: Batch, places: Mapping[int, Place], rank: int) -> Share:
        """`bare`: the batch without its groups. `places`: theirs in the segments, by `group_id`, in the batch's
        order."""
        batch = self._batch
        try:
            if batch is None or (batch.step, batch.branch) != (bare.step, bare.branch):
                groups = [for_learner(self._header(group_id, place)) for group_id, place in places.items()]
                batch = self._batch = replace(bare, groups=groups, deal=self._dealer.deal(groups))
            payloads = self._payloads(batch, list(places.items()), rank)
        except BadRecord as bad:
            reason = f"batch {bare.step} can't be read back: {bad}"
            return NoBatch(step=bare.step, reason=reason, unreadable=True), ()
        return batch, frames_of(payloads)

    def _header(self, group_id: int, place: Place) -> Group:
        recent = self.recent.get(group_id)
        return recent[0] if recent else self._journal.read_header(place)

    def _payloads(self, batch: Batch, members: Sequence[tuple[int, Place]], rank: int) -> list[Payload]:
        """Of the pieces of the share."""
        payloads = []
        for piece in share_of(batch, rank):
            group_id, place = members[piece.place]
            _, payload = self.recent.get(group_id) or self._journal.read(place)
            payloads.append(payload.of_completions(batch.groups[piece.place], piece.indices))
        return payloads
