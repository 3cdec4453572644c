"""What a rank of the learner is sent of a batch: all headers, and the payload of its share.

In: a batch that was cut, and the places of its groups. Out: its `Batch` message with the frames of the share, or a
`NoBatch` that says what can't be read. A batch that can't be read stays cut: only a rollback may give it other members,
since then every rank has ended. Called in a thread, one call at a time.
Memory: the headers of the batch that was read last, because other ranks ask for it; buffers for two shares.
Does not own: when a batch is sent (`dispatch`), who trains on what (`asyncdapo.shares`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.payloads import BadRecord, Place
from asyncdapo.shares import Batch, Dealer, NoBatch, for_learner, share_of
from asyncdapo.transport.codec import Buffer
from asyncdapo.transport.payload import Payload

Share = tuple[Batch | NoBatch, Sequence[Buffer]]


class ShareReader:
    """Reads shares back from the segments."""

    def __init__(self, journal: Journal, dealer: Dealer) -> None:
        self._journal, self._dealer = journal, dealer
        self._batch: Batch | None = None
        self._memory = ReusedMemory()

    def read(self, bare: Batch, places: Sequence[Place], rank: int) -> Share:
        """`bare`: the batch without its groups, which are at `places`."""
        batch = self._batch
        try:
            if batch is None or (batch.step, batch.branch) != (bare.step, bare.branch):
                groups = [for_learner(self._journal.read_header(place)) for place in places]
                batch = self._batch = replace(bare, groups=groups, deal=self._dealer.deal(groups))
            payload = self._read_payload(batch, places, rank)
        except BadRecord as bad:
            reason = f"batch {bare.step} can't be read back: {bad}"
            return NoBatch(step=bare.step, reason=reason, unreadable=True), ()
        return batch, payload.frames()

    def _read_payload(self, batch: Batch, places: Sequence[Place], rank: int) -> Payload:
        pieces, parts = share_of(batch, rank), list[Payload]()
        left = self._memory.take(sum(places[piece.place].num_bytes for piece in pieces)).data
        for piece in pieces:
            place = places[piece.place]
            memory, left = left[: place.num_bytes], left[place.num_bytes :]
            _, payload = self._journal.read(place, memory)
            parts.append(payload.of_completions(batch.groups[piece.place], piece.indices))
        return Payload.join(parts, self._memory.take(sum(part.num_bytes for part in parts)))


class ReusedMemory:
    """Large buffers that are used again when nobody has a view of them any more, since to touch a fresh page costs more
    than to fill it. At most as many are kept as were lent at once."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes] with any content."""
        whole = self._free.pop() if self._free else None
        if whole is None or whole.nbytes < num_bytes:
            whole = np.empty(num_bytes, np.uint8)
        lent = np.frombuffer(whole.data[:num_bytes], np.uint8)  # its views keep it alive, and not `whole` alone
        weakref.finalize(lent, self._free.append, whole).atexit = False
        return lent
