"""Receiver of the weights: a rollout worker's end of a transfer.

In: the learner's broadcasts. Out: tensors of a new version, in memory of their own (the second buffer; the first is
what the engine goes on generating with). Invariant: nothing is returned that was not announced as the expected version
and did not match the checksum at every receiver; after a WeightsError the caller keeps its old weights. Does not own:
loading them into an engine.

Shape: U bytes (uint8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asyncdapo.transport.process_group import Broadcast, Deadline
from asyncdapo.weights.checksum import NUM_WORDS as NUM_CHECKSUM_WORDS
from asyncdapo.weights.checksum import Checksum
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.header import NUM_WORDS as NUM_HEADER_WORDS
from asyncdapo.weights.header import Header, Verdict, settle
from asyncdapo.weights.layout import Bucket, Manifest, plan_buckets


class WeightReceiver:
    """Receives versions of one manifest through one group, onto `device`."""

    def __init__(self, group: WeightGroup, manifest: Manifest, device: torch.device) -> None:
        self._group, self._manifest, self._device = group, manifest, device
        self._offsets = manifest.offsets

    def receive(self, expected_version: int, *, branch: int = 0) -> dict[str, torch.Tensor]:
        """The weights of `expected_version` under their names in the manifest; blocks until they are complete.

        The tensors are views of one new buffer, which is freed with the last of them. Raises WeightsError when the
        transfer fails, is refused by any receiver, or isn't over the group's timeout after this call.
        """
        deadline = Deadline(self._group.timeout_s)
        header = self._receive_header(expected_version, branch, deadline)
        stream_U = torch.empty(self._offsets[-1], dtype=torch.uint8, device=self._device)
        checksum = self._receive_buckets(stream_U, plan_buckets(self._manifest, header.bucket_bytes), deadline)
        sent = self._receive_words(NUM_CHECKSUM_WORDS, deadline)
        settle(self._group, Verdict.GOOD if sent == checksum.digest().tolist() else Verdict.CHANGED, deadline)
        return self._tensors(stream_U)

    def _receive_words(self, num_words: int, deadline: Deadline) -> list[int]:
        words = torch.zeros(num_words, dtype=torch.int64, device=self._group.device)
        self._group.broadcast(words, deadline).wait()
        return words.tolist()

    def _receive_header(self, expected_version: int, branch: int, deadline: Deadline) -> Header:
        header = Header.decode(self._receive_words(NUM_HEADER_WORDS, deadline))
        settle(self._group, self._judge(header, expected_version, branch), deadline)
        assert header is not None, "a missing header was refused"
        return header

    def _judge(self, header: Header | None, expected_version: int, branch: int) -> Verdict:
        if header is None:
            return Verdict.NO_HEADER
        if header.branch != branch:
            return Verdict.OTHER_BRANCH
        if header.version != expected_version:
            return Verdict.OTHER_VERSION
        if (header.manifest_digest, header.stream_bytes) != (self._manifest.digest, self._offsets[-1]):
            return Verdict.OTHER_MANIFEST
        return Verdict.GOOD

    def _receive_buckets(self, stream_U: torch.Tensor, buckets: list[Bucket], deadline: Deadline) -> Checksum:
        """Fill uint8 [U] bucket by bucket; while one is under way the one before is checked."""
        checksum = Checksum()
        staging = self._staging(buckets)
        before: Arrival | None = None
        for number, bucket in enumerate(buckets):
            target_U = stream_U[bucket.start : bucket.stop]
            landing_U = staging[number % 2][: len(target_U)] if staging else target_U
            arrival = Arrival(landing_U, target_U, self._group.broadcast(landing_U, deadline))
            if before:
                checksum.update(before.complete())
            before = arrival
        if before:
            checksum.update(before.complete())
        return checksum

    def _staging(self, buckets: list[Bucket]) -> list[torch.Tensor]:
        """Two buckets of memory where the group can write; none when it can write to our device itself."""
        if self._group.device.type == self._device.type:
            return []
        largest = max((bucket.stop - bucket.start for bucket in buckets), default=0)
        return [torch.empty(largest, dtype=torch.uint8, device=self._group.device) for _ in range(2)]

    def _tensors(self, stream_U: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            spec.name: stream_U[start : start + spec.num_bytes].view(getattr(torch, spec.dtype)).view(spec.shape)
            for spec, start in zip(self._manifest.tensors, self._offsets, strict=False)
        }


@dataclass(frozen=True)
class Arrival:
    """A bucket under way: uint8 [U] where it lands, and where it belongs."""

    landing_U: torch.Tensor
    target_U: torch.Tensor
    broadcast: Broadcast

    def complete(self) -> torch.Tensor:
        """Wait for the bucket and return it where it belongs."""
        self.broadcast.wait()
        if self.landing_U is not self.target_U:
            self.target_U.copy_(self.landing_U)
        return self.target_U
