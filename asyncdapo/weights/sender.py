"""Sender of the weights: the learner's side of a transfer.

In: the learner's tensors, on any device and in any dtype, or this rank's shards of them. Out: the same numbers at every
receiver, in the manifest's dtypes. It needs two buckets of memory: while one is sent, the next is filled and converted,
by all shards on this machine together; and memory for what the shards elsewhere have of one bucket. Invariant: `send`
returns only after every receiver has confirmed the version's checksum. Owns no weights.

Shape: U bytes (uint8).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist

from asyncdapo.transport.carrier import Transfer
from asyncdapo.transport.deadline import Deadline
from asyncdapo.weights.checksum import Checksum
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.header import Header, agree, confirm
from asyncdapo.weights.manifest import Manifest, Part, part_of, plan_buckets
from asyncdapo.weights.shards import SENDER, Copies, Shards, copy, local_shards, views


@dataclass(frozen=True)
class SendReport:
    """One transfer that every receiver has confirmed."""

    version: int
    num_bytes: int
    """Bytes of the tensors, counted once for any number of receivers."""
    seconds: float
    gather_s: float
    """Of these, until the buckets were filled: with what other shards have, too, and in the dtypes of the wire."""


class WeightSender:
    """Sends versions of one manifest through one connected group, in buckets of at most `bucket_bytes` (a multiple of
    64). It allocates memory for two buckets."""

    def __init__(self, group: WeightGroup, manifest: Manifest, bucket_bytes: int, shards: Shards | None = None) -> None:
        """`shards`: of the learner, whose first one is here; without, tensors are whole."""
        self._group, self._manifest, self._shards = group, manifest, shards or Shards({})
        self._digest, self._stream_bytes = manifest.digest, manifest.offsets[-1]
        self._bucket_bytes = bucket_bytes
        self._buckets = plan_buckets(manifest, bucket_bytes)
        largest = max((bucket.stop - bucket.start for bucket in self._buckets), default=0)
        self._memory = group.carrier.buffers(largest)
        self._gathers: list[Gather] = []
        """Of each bucket, once the other ranks have heard of its memory."""

    def send(self, version: int, tensors: Mapping[str, torch.Tensor], *, branch: int = 0) -> SendReport:
        """Send these tensors as the weights of `version`; blocks until every receiver has them. Of a sharded learner
        every rank with another shard calls `Giver.give`.

        Raises ValueError if they don't fit the manifest. Raises WeightsError if the transfer fails, is refused, or
        exceeds the group's timeout; no receiver uses the version then. Raises PyTorch's error if a rank of the learner
        is gone. Don't change the tensors during the call.
        """
        began_s = time.monotonic()
        with self._shards.one_transfer():
            sources = local_shards(tensors, self._manifest)
            deadline = Deadline(self._group.timeout_s)
            agree(self._group, self._header(version, branch), deadline)
            checksum, gather_s = self._send_buckets(sources, deadline)
        confirm(self._group, checksum.words(), deadline)
        return SendReport(version, self._manifest.num_bytes, time.monotonic() - began_s, gather_s)

    def _header(self, version: int, branch: int) -> Header:
        return Header(
            branch=branch,
            version=version,
            manifest_digest=self._digest,
            stream_bytes=self._stream_bytes,
            bucket_bytes=self._bucket_bytes,
        )

    def _send_buckets(self, sources: list[torch.Tensor], deadline: Deadline) -> tuple[Checksum, float]:
        """Fill a bucket and update the checksum while the bucket before it is sent. What comes from shards elsewhere is
        on its way meanwhile. Returns the seconds that filling took, too."""
        checksum, gather_s = Checksum(), 0.0
        gathers = self._gathers = self._gathers or self._meet(deadline)
        before: Transfer | None = None
        coming: dist.Work | None = None
        for gather, after in zip_longest(gathers, gathers[1:]):
            began_s = time.monotonic()
            gather.fill(sources, coming or gather.ask(deadline))
            gather_s += time.monotonic() - began_s
            under_way = self._group.carrier.carry(gather.bucket_U, deadline)
            coming = after.ask(deadline) if after and after.asks_ahead else None
            checksum.update(gather.bucket_U)
            if before:
                before.wait()
            before = under_way
        if before:
            before.wait()
        return checksum, gather_s

    def _meet(self, deadline: Deadline) -> list[Gather]:
        """Tell the other ranks where the buckets are. Returns how each is filled."""
        near = self._shards.offer(self._memory, deadline)
        parts = [
            [part_of(bucket, self._manifest, shard, self._shards.count) for shard in range(self._shards.count)]
            for bucket in self._buckets
        ]
        far = [number for number, is_near in enumerate(near) if not is_near]
        most = max((sum(of_bucket[number].num_bytes for number in far) for of_bucket in parts), default=0)
        collected_U = torch.zeros(most, dtype=torch.uint8, device=self._shards.device)
        memory = [block.bytes_U for block in self._memory]
        return [
            Gather(
                memory[n % 2][: bucket.stop - bucket.start], collected_U, parts[n], near, self._manifest, self._shards
            )
            for n, bucket in enumerate(self._buckets)
        ]


class Gather:
    """Fills one bucket with the sender's own pieces and those of the other shards."""

    def __init__(
        self,
        bucket_U: torch.Tensor,
        collected_U: torch.Tensor,
        parts: Sequence[Part],
        near: Sequence[bool],
        manifest: Manifest,
        shards: Shards,
    ) -> None:
        """`parts`: of each shard, the sender's first; `near`: which of them are written into the bucket; `collected_U`
        is memory for the others, or more."""
        self.bucket_U, self._shards = bucket_U, shards
        self._own = Copies.into(bucket_U, parts[SENDER].pieces, manifest, shards)
        self._num_bytes = [0 if is_near else part.num_bytes for part, is_near in zip(parts, near, strict=True)]
        self._collected_U = collected_U[: sum(self._num_bytes)]
        far = [part for part, is_near in zip(parts, near, strict=True) if not is_near]
        self._places = [view for part in far for view in views(bucket_U, part.pieces, manifest)]
        memories = self._collected_U.split([part.num_bytes for part in far])
        self._parts = [
            view
            for memory_U, part in zip(memories, far, strict=True)
            for view in views(memory_U, part.packed, manifest)
        ]
        self.asks_ahead = 0 < len(far) == len(parts) - 1
        """Whether it may `ask` while its memory is still in use: no other rank writes into it."""

    def ask(self, deadline: Deadline) -> dist.Work | None:
        """Start to collect what the other shards have; the bucket before has to be filled."""
        self._shards.tell(deadline, more=True)
        return self._shards.collect(self._collected_U, self._num_bytes, deadline)

    def fill(self, sources: Sequence[torch.Tensor], coming: dist.Work | None) -> None:
        """`sources`: this rank's shards of the manifest's tensors, in any dtype, on any device."""
        self._own.run(sources)
        if coming:
            coming.wait()
        copy(self._places, self._parts)
