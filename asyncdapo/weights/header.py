"""The exchanges before and after the buckets of a transfer.

    rank 0       version, branch, manifest, bucket size      buckets …      checksum of what it sent
    the others   the values that they expect                                checksum of what arrived

Each exchange is one collective: every rank gets the words of all and comes to the same result. So a transfer succeeds
for every rank or for none. (Only a rank that dies within the last exchange leaves the others in doubt.) After a refusal
the ranks are still in step, and the group can be used again. Out: WeightsError that names the ranks that differ, and
how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from asyncdapo.errors import WeightsError
from asyncdapo.transport.deadline import Deadline
from asyncdapo.transport.process_group import ROOT
from asyncdapo.weights.group import WeightGroup

MAGIC = 0x41444150_57474854
"""First word of a header: `ADAPWGHT` in ASCII."""

DIFFERENCES = {
    "branch": "expects another branch",
    "version": "expects another version",
    "manifest_digest": "has a manifest of other tensors",
    "stream_bytes": "has a manifest of other tensors",
}


@dataclass(frozen=True, kw_only=True)
class Header:
    """One transfer, as rank 0 announces it or another rank expects it. Each field is an int64 word after `MAGIC`."""

    branch: int
    version: int
    manifest_digest: int
    stream_bytes: int
    bucket_bytes: int = 0
    """Set by rank 0 only."""

    def difference(self, other: Header) -> str:
        """Why the two don't belong to one transfer; "" if they do."""
        return next((why for key, why in DIFFERENCES.items() if getattr(self, key) != getattr(other, key)), "")


def agree(group: WeightGroup, header: Header, deadline: Deadline) -> Header:
    """Send this header to every rank; returns rank 0's. Raises WeightsError, at every rank, unless all headers belong
    to one transfer."""
    rows = group.exchange_rows([MAGIC, *astuple(header)], deadline)
    if any(magic != MAGIC for magic, *_ in rows):
        raise WeightsError("transfer of weights refused: a rank sent something that isn't a header")
    headers = [_header(words) for _, *words in rows]
    _refuse({rank: headers[ROOT].difference(other) for rank, other in enumerate(headers)})
    return headers[ROOT]


def confirm(group: WeightGroup, checksum: Sequence[int], deadline: Deadline) -> None:
    """Send this checksum to every rank. Raises WeightsError, at every rank, unless all equal rank 0's."""
    rows = group.exchange_rows(checksum, deadline)
    changed = "the weights arrived changed (checksum)"
    _refuse({rank: changed if row != rows[ROOT] else "" for rank, row in enumerate(rows)})


def _header(words: Sequence[int]) -> Header:
    branch, version, manifest_digest, stream_bytes, bucket_bytes = words
    return Header(
        branch=branch,
        version=version,
        manifest_digest=manifest_digest,
        stream_bytes=stream_bytes,
        bucket_bytes=bucket_bytes,
    )


def _refuse(problems: dict[int, str]) -> None:
    refusals = [f"rank {rank} {problem}" for rank, problem in problems.items() if problem]
    if refusals:
        raise WeightsError(f"transfer of weights refused: {', '.join(refusals)}")
