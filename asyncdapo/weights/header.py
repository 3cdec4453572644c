"""What surrounds the buckets of a transfer: what every end says before them, and after.

    rank 0       version, branch, manifest, bucket size      buckets …      checksum of what it sent
    the others   what they expect of these                                  checksum of what arrived

Every rank gets the words of all, in one collective each time, and judges alike. So a transfer succeeds for every rank
or for none (only a rank that dies within the last exchange leaves the others in doubt), and a refusal leaves the group
in step: it can be used again. In: promises and expectations. Out: WeightsError that names the ranks which differ, and
in what.
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
    """One transfer, as rank 0 announces it or another rank expects it; every field is an int64 word after `MAGIC`."""

    branch: int
    version: int
    manifest_digest: int
    stream_bytes: int
    bucket_bytes: int = 0
    """For rank 0 to say."""

    def difference(self, other: Header) -> str:
        """Why the two aren't of one transfer; nothing if they are."""
        return next((why for key, why in DIFFERENCES.items() if getattr(self, key) != getattr(other, key)), "")


def agree(group: WeightGroup, header: Header, deadline: Deadline) -> Header:
    """Tell every rank this header; returns that of rank 0. Raises WeightsError, at every rank alike, unless all are of
    one transfer."""
    rows = group.exchange_rows([MAGIC, *astuple(header)], deadline)
    if any(magic != MAGIC for magic, *_ in rows):
        raise WeightsError("transfer of weights refused: what a rank said is no header")
    headers = [_header(words) for _, *words in rows]
    _refuse({rank: headers[ROOT].difference(other) for rank, other in enumerate(headers)})
    return headers[ROOT]


def confirm(group: WeightGroup, checksum: Sequence[int], deadline: Deadline) -> None:
    """Tell every rank this checksum. Raises WeightsError, at every rank alike, unless all are that of rank 0."""
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
