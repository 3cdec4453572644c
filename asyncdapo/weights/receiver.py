"""Receiver of the weights: one rank's side of a transfer.

In: the learner's broadcasts. Out: the tensors of a new version, in separate memory; the engine generates with its old
ones meanwhile. Invariant: a version is returned only if the learner announced it as the expected one and every receiver
confirmed its checksum. After a WeightsError the caller keeps its old weights. Does not own: loading into an engine.

Shape: U bytes (uint8).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from asyncdapo.transport.carrier import Transfer
from asyncdapo.transport.deadline import Deadline
from asyncdapo.weights.checksum import Checksum
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.header import Header, agree, confirm
from asyncdapo.weights.manifest import Bucket, Manifest, plan_buckets


class WeightReceiver:
    """Receives versions of one manifest through one connected group, into `stream_U`: uint8 [U], U the length of the
    manifest's stream, on any device."""

    def __init__(self, group: WeightGroup, manifest: Manifest, stream_U: torch.Tensor) -> None:
        self._group, self._stream_U = group, stream_U
        self._stream_bytes = manifest.offsets[-1]
        if len(stream_U) != self._stream_bytes:
            raise ValueError(f"the stream has {self._stream_bytes} bytes, the memory for it {len(stream_U)}")
        self._digest = manifest.digest
        self._plan = lru_cache(1)(partial(plan_buckets, manifest))
        self._tensors = tensors_in(stream_U, manifest)

    def receive(self, expected_version: int, *, branch: int = 0) -> dict[str, torch.Tensor]:
        """The weights of `expected_version` by their names in the manifest; blocks until they are complete.

        The tensors are views of the stream's memory: the next call invalidates them, even if it fails. Raises
        WeightsError if the transfer fails, if any receiver refuses it, or if it exceeds the group's timeout.
        """
        deadline = Deadline(self._group.timeout_s)
        header = agree(self._group, self._expected(expected_version, branch), deadline)
        checksum = self._receive_buckets(self._plan(header.bucket_bytes), deadline)
        confirm(self._group, checksum.words(), deadline)
        return dict(self._tensors)

    def _expected(self, version: int, branch: int) -> Header:
        return Header(branch=branch, version=version, manifest_digest=self._digest, stream_bytes=self._stream_bytes)

    def _receive_buckets(self, buckets: list[Bucket], deadline: Deadline) -> Checksum:
        """Fill the stream bucket by bucket; check each while the next one arrives."""
        checksum = Checksum()
        landings = self._landings(buckets)
        before: Arrival | None = None
        for number, bucket in enumerate(buckets):
            target_U = self._stream_U[bucket.start : bucket.stop]
            landing_U = landings[number % 2][: len(target_U)] if landings else target_U
            arrival = Arrival(landing_U, target_U, self._group.carrier.carry(landing_U, deadline))
            if before:
                checksum.update(before.complete())
            before = arrival
        if before:
            checksum.update(before.complete())
        return checksum

    def _landings(self, buckets: list[Bucket]) -> list[torch.Tensor]:
        """Two buckets of memory that the group can write to; none if it can write to the stream directly."""
        carrier = self._group.carrier
        if carrier.reaches(self._stream_U.device):
            return []
        largest = max((bucket.stop - bucket.start for bucket in buckets), default=0)
        return [torch.empty(largest, dtype=torch.uint8, device=carrier.device) for _ in range(2)]


@dataclass(frozen=True)
class Arrival:
    """A bucket on its way: the memory it arrives in and the memory it belongs to, both uint8 [U]."""

    landing_U: torch.Tensor
    target_U: torch.Tensor
    transfer: Transfer

    def complete(self) -> torch.Tensor:
        """Wait for the bucket and return it in the memory it belongs to."""
        self.transfer.wait()
        if self.landing_U is not self.target_U:
            self.target_U.copy_(self.landing_U)
        return self.target_U


def tensors_in(stream_U: torch.Tensor, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The manifest's tensors by name, as views of its stream."""
    return {
        spec.name: stream_U[start : start + spec.num_bytes].view(getattr(torch, spec.dtype)).view(spec.shape)
        for spec, start in zip(manifest.tensors, manifest.offsets[:-1], strict=True)
    }
