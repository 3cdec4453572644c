"""Sender of the weights: the learner's side of a transfer.

In: the learner's tensors, on any device and in any dtype. Out: the same numbers at every receiver, in the manifest's
dtypes. It needs two buckets of memory: while one is sent, the next is filled and converted. Invariant: `send` returns
only after every receiver has confirmed the version's checksum. Owns no weights.

Shape: U bytes (uint8).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from asyncdapo.transport.carrier import Transfer
from asyncdapo.transport.deadline import Deadline
from asyncdapo.weights.checksum import Checksum
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.header import Header, agree, confirm
from asyncdapo.weights.manifest import Bucket, Manifest, Piece, plan_buckets


@dataclass(frozen=True)
class SendReport:
    """One transfer that every receiver has confirmed."""

    version: int
    num_bytes: int
    """Bytes of the tensors, counted once for any number of receivers."""
    seconds: float


class WeightSender:
    """Sends versions of one manifest through one connected group, in buckets of at most `bucket_bytes` (a multiple of
    64). It allocates memory for two buckets."""

    def __init__(self, group: WeightGroup, manifest: Manifest, bucket_bytes: int) -> None:
        self._group, self._manifest = group, manifest
        self._digest, self._stream_bytes = manifest.digest, manifest.offsets[-1]
        self._bucket_bytes = bucket_bytes
        buckets = plan_buckets(manifest, bucket_bytes)
        buffers = group.carrier.buffers(max((bucket.stop - bucket.start for bucket in buckets), default=0))
        self._gathers = [Gather.into(buffers[number % 2], bucket, manifest) for number, bucket in enumerate(buckets)]

    def send(self, version: int, tensors: Mapping[str, torch.Tensor], *, branch: int = 0) -> SendReport:
        """Send these tensors as the weights of `version`; blocks until every receiver has them.

        Raises ValueError if they don't fit the manifest. Raises WeightsError if the transfer fails, is refused, or
        exceeds the group's timeout; no receiver uses the version then. Don't change the tensors during the call.
        """
        began_s = time.monotonic()
        sources = self._sources(tensors)
        deadline = Deadline(self._group.timeout_s)
        agree(self._group, self._header(version, branch), deadline)
        checksum = self._send_buckets(sources, deadline)
        confirm(self._group, checksum.words(), deadline)
        return SendReport(version, self._manifest.num_bytes, time.monotonic() - began_s)

    def _sources(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        if differing := tensors.keys() ^ {spec.name for spec in self._manifest.tensors}:
            raise ValueError(f"tensors and manifest differ in {sorted(differing)[:3]}")
        sources = [tensors[spec.name].detach() for spec in self._manifest.tensors]
        for spec, source in zip(self._manifest.tensors, sources, strict=True):
            if source.shape != spec.shape:
                raise ValueError(f"{spec.name} has shape {tuple(source.shape)}, the manifest says {spec.shape}")
        return sources

    def _header(self, version: int, branch: int) -> Header:
        return Header(
            branch=branch,
            version=version,
            manifest_digest=self._digest,
            stream_bytes=self._stream_bytes,
            bucket_bytes=self._bucket_bytes,
        )

    def _send_buckets(self, sources: list[torch.Tensor], deadline: Deadline) -> Checksum:
        """Fill a bucket and update the checksum while the bucket before it is sent."""
        checksum = Checksum()
        before: Transfer | None = None
        for gather in self._gathers:
            gather.run(sources)
            under_way = self._group.carrier.carry(gather.buffer_U, deadline)
            checksum.update(gather.buffer_U)
            if before:
                before.wait()
            before = under_way
        if before:
            before.wait()
        return checksum


@dataclass(frozen=True)
class Gather:
    """Copies the pieces of one bucket into uint8 [U], each converted to its dtype in the manifest."""

    buffer_U: torch.Tensor
    pieces: list[Piece]
    targets: list[torch.Tensor]
    """Views of the buffer, one for each piece."""

    @staticmethod
    def into(buffer_U: torch.Tensor, bucket: Bucket, manifest: Manifest) -> Gather:
        """A gather into the beginning of a buffer, which may be longer than the bucket."""
        targets = []
        for piece in bucket.pieces:
            spec = manifest.tensors[piece.tensor]
            num_bytes = (piece.stop - piece.start) * spec.itemsize
            targets.append(buffer_U[piece.offset : piece.offset + num_bytes].view(getattr(torch, spec.dtype)))
        return Gather(buffer_U[: bucket.stop - bucket.start], list(bucket.pieces), targets)

    def run(self, sources: Sequence[torch.Tensor]) -> None:
        """`sources` are the tensors of the manifest, in any dtype, on any device."""
        pieces = [sources[piece.tensor].reshape(-1)[piece.start : piece.stop] for piece in self.pieces]
        torch._foreach_copy_(self.targets, pieces)  # pyright: ignore[reportPrivateImportUsage] (no public name)
