"""The tokens and log-probs of one rank's share of a batch, read from the segments that the replay server writes.

    RUN_DIR/payloads/000007.bin ──a record for each group of which the rank has a piece──▶ Payload, joined in order

In: a batch with the places of its records, all of which are on disk. Out: the rank's `Payload`, or BatchError: the run
then goes back to its checkpoint, and the rollback finds what is damaged and samples those prompts again. Invariant: the
tokens are those that were written: each record's checksums hold, and its group is that of the header in the batch.
Does not own: the format of a record (`records/record`), who trains on what (`shares`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asyncdapo.errors import BatchError, ConfigError
from asyncdapo.messages import Group
from asyncdapo.records.record import PAYLOAD_FOLDER, BadRecord, Place, read_records
from asyncdapo.shares import Batch, Piece, share_of
from asyncdapo.transport.payload import Payload

Share = Sequence[tuple[Piece, Place]]
"""What a rank trains on, and where the record of each piece's group is."""


def check_folder(run_dir: Path, who: str) -> None:
    """The replay server has made the folder before any rank starts. Raises ConfigError where it isn't seen."""
    folder = run_dir / PAYLOAD_FOLDER
    if not folder.is_dir():
        problem = f"has to be on storage that all nodes share: {who} reads its tokens from {folder}, which isn't there"
        fix = "choose a directory that every node sees under the same path"
        raise ConfigError("run.dir", problem, str(run_dir), fix)


def located_share(batch: Batch, rank: int) -> Share:
    """Raises ValueError for a batch whose parts are not of the same groups."""
    if len(batch.places) != len(batch.groups):
        raise ValueError(f"{len(batch.places)} places for {len(batch.groups)} groups")
    return [(piece, batch.places[piece.place]) for piece in share_of(batch, rank)]


def read_share(run_dir: Path, step: int, share: Share) -> Payload:
    """The payload of a share of batch `step`, joined. Blocks for as long as the storage takes. Raises BatchError."""
    try:
        records = read_records(run_dir / PAYLOAD_FOLDER, [place for _, place in share])
        return Payload.join([_tokens_of(piece, place, *records[place]) for piece, place in share])
    except BadRecord as bad:
        raise BatchError(f"batch {step} can't be read back from {run_dir}: {bad}") from bad


def _tokens_of(piece: Piece, place: Place, group: Group, payload: Payload) -> Payload:
    """The piece's part of its group. Raises BadRecord if the record is another group's."""
    if _identity(group) != _identity(piece.header):
        raise BadRecord(f"{place} holds group {group.lease_id}, not group {piece.header.lease_id}")
    return payload.of_completions(group, piece.indices)


def _identity(group: Group) -> tuple[int, int, int]:
    return group.lease_id, group.prompt_id, group.branch
