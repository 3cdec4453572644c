"""Sender of the weights: the learner's end of a transfer.

In: the learner's tensors, on any device and in any dtype. Out: the same numbers at every receiver, in the dtypes of the
manifest. Two buckets of memory are all that it adds: while one is under way the next is gathered and converted.
Invariant: `send` returns only after every receiver has checked the version's checksum. Owns no weights.

Shape: U bytes (uint8).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from asyncdapo.transport.process_group import Broadcast, Deadline
from asyncdapo.weights.checksum import Checksum
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.header import Header, Verdict, settle
from asyncdapo.weights.layout import Bucket, Manifest, plan_buckets


@dataclass(frozen=True)
class SendReport:
    """One transfer that every receiver has confirmed."""

    version: int
    num_bytes: int
    """Bytes of the tensors, counted once however many receivers there are."""
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.seconds


class WeightSender:
    """Sends versions of one manifest through one group. `bucket_bytes` is a multiple of 64; its memory is allocated
    here, twice."""

    def __init__(self, group: WeightGroup, manifest: Manifest, bucket_bytes: int) -> None:
        self._group, self._manifest = group, manifest
        self._buckets = plan_buckets(manifest, bucket_bytes)
        self._bucket_bytes = bucket_bytes
        largest = max((bucket.stop - bucket.start for bucket in self._buckets), default=0)
        self._buffers = [torch.zeros(largest, dtype=torch.uint8, device=group.device) for _ in range(2)]

    def send(self, version: int, tensors: Mapping[str, torch.Tensor], *, branch: int = 0) -> SendReport:
        """Send these tensors as the weights of `version`; blocks until every receiver has them.

        Raises ValueError when they don't fit the manifest, WeightsError when the transfer fails, is refused, or takes
        longer than the group's timeout; then no receiver uses them. Don't change the tensors meanwhile.
        """
        began_s = time.monotonic()
        sources = self._sources(tensors)
        deadline = Deadline(self._group.timeout_s)
        self._announce(version, branch, deadline)
        checksum = self._send_buckets(sources, deadline)
        self._group.broadcast(checksum.digest().to(self._group.device), deadline).wait()
        settle(self._group, Verdict.GOOD, deadline)
        return SendReport(version, self._manifest.num_bytes, time.monotonic() - began_s)

    def _sources(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        if differing := tensors.keys() ^ {spec.name for spec in self._manifest.tensors}:
            raise ValueError(f"tensors and manifest differ in {sorted(differing)[:3]}")
        sources = [tensors[spec.name].detach() for spec in self._manifest.tensors]
        for spec, source in zip(self._manifest.tensors, sources, strict=True):
            if tuple(source.shape) != spec.shape:
                raise ValueError(f"{spec.name} has shape {tuple(source.shape)}, the manifest says {spec.shape}")
        return sources

    def _announce(self, version: int, branch: int, deadline: Deadline) -> None:
        header = Header(branch, version, self._manifest.digest, self._manifest.offsets[-1], self._bucket_bytes)
        self._group.broadcast(header.encode().to(self._group.device), deadline).wait()
        settle(self._group, Verdict.GOOD, deadline)

    def _send_buckets(self, sources: list[torch.Tensor], deadline: Deadline) -> Checksum:
        checksum = Checksum()
        under_way: Broadcast | None = None
        for number, bucket in enumerate(self._buckets):
            buffer_U = self._buffers[number % 2][: bucket.stop - bucket.start]
            self._gather(bucket, sources, buffer_U)
            if under_way:
                under_way.wait()
            under_way = self._group.broadcast(buffer_U, deadline)
            checksum.update(buffer_U)
        if under_way:
            under_way.wait()
        return checksum

    def _gather(self, bucket: Bucket, sources: list[torch.Tensor], buffer_U: torch.Tensor) -> None:
        """Copy the bucket's pieces into uint8 [U], each converted to its dtype of the manifest."""
        for piece in bucket.pieces:
            spec = self._manifest.tensors[piece.tensor]
            num_bytes = (piece.stop - piece.start) * spec.itemsize
            target = buffer_U[piece.offset : piece.offset + num_bytes].view(getattr(torch, spec.dtype))
            target.copy_(sources[piece.tensor].reshape(-1)[piece.start : piece.stop])
