"""Manifest of the weights on the wire: which tensors there are, and in which pieces they travel.

In: the learner's tensors. Out: a `Manifest`, which the learner computes once and each receiver gets when it joins; and
`Bucket`s, which both ends compute from manifest and bucket size. Imports no torch, so that the controller can pass
manifests on.

All tensors, in order, form one stream of bytes. Each starts at a multiple of `ALIGN_BYTES`. The gaps are sent too; they
are less than 0.1 % of a real model. A bucket is a contiguous range of the stream: either whole tensors, or part of one
tensor that is larger than a bucket.

Invariants: the buckets of a plan cover the stream once, in order, without gaps; no bucket exceeds the bucket size; no
element is split; a tensor that fits a bucket is never cut.

Where the learner is sharded, each shard has consecutive rows of every tensor (`part_of`), as FSDP2 divides them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from asyncdapo.model.rows import rows_of_shard

if TYPE_CHECKING:
    import torch

ALIGN_BYTES = 64
"""Start of every tensor in the stream: a cache line, and a multiple of every element size."""


class TensorSpec(Struct, frozen=True, kw_only=True):
    """One tensor on the wire: its Hugging Face name, and the dtype in which it arrives (a torch name: `bfloat16`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    itemsize: int
    """Bytes of one element."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


class Manifest(Struct, frozen=True, kw_only=True):
    """Every tensor of a model, in the order in which they are sent. Tied tensors are listed once."""

    tensors: tuple[TensorSpec, ...]

    @staticmethod
    def of(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> Manifest:
        """Manifest of these tensors in their order. If `dtype` is given, floating-point ones are converted to it."""
        specs: list[TensorSpec] = []
        for name, tensor in tensors.items():
            sent = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
            specs.append(
                TensorSpec(
                    name=name,
                    dtype=str(sent).removeprefix("torch."),
                    shape=tuple(tensor.shape),
                    itemsize=sent.itemsize,
                )
            )
        return Manifest(tensors=tuple(specs))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors: the metric `weights/bytes`."""
        return sum(spec.num_bytes for spec in self.tensors)

    @property
    def offsets(self) -> list[int]:
        """First byte of each tensor in the stream; the last entry is the length of the stream."""
        offsets = [0]
        for spec in self.tensors:
            offsets.append(_align(offsets[-1] + spec.num_bytes))
        return offsets

    @property
    def digest(self) -> int:
        """63-bit hash of names, dtypes, shapes and order."""
        return int.from_bytes(blake2b(msgspec.msgpack.encode(self), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of tensor number `tensor`, at byte `offset` of their bucket."""

    tensor: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Bytes `start` to `stop` of the stream, sent in one broadcast."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


def plan_buckets(manifest: Manifest, bucket_bytes: int) -> list[Bucket]:
    """Cut the stream into buckets of at most `bucket_bytes` (a multiple of `ALIGN_BYTES`)."""
    if bucket_bytes < ALIGN_BYTES or bucket_bytes % ALIGN_BYTES:
        raise ValueError(f"bucket_bytes must be a positive multiple of {ALIGN_BYTES}, got {bucket_bytes}")
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    start = stop = 0
    for number, spec in enumerate(manifest.tensors):
        for first, last in _cuts(spec, bucket_bytes):
            size = _align((last - first) * spec.itemsize)
            if pieces and stop + size - start > bucket_bytes:
                buckets.append(Bucket(start, stop, tuple(pieces)))
                pieces, start = [], stop
            pieces.append(Piece(number, first, last, stop - start))
            stop += size
    if pieces:
        buckets.append(Bucket(start, stop, tuple(pieces)))
    return buckets


@dataclass(frozen=True)
class Part:
    """What one shard has of a bucket. The parts of all shards are the bucket."""

    pieces: tuple[Piece, ...]
    """At their offsets in the bucket."""
    packed: tuple[Piece, ...]
    """The same one after the other, each at a multiple of `ALIGN_BYTES`."""
    num_bytes: int
    """What they take so."""


def part_of(bucket: Bucket, manifest: Manifest, shard: int, num_shards: int) -> Part:
    """What shard number `shard` of `num_shards` has of this bucket."""
    pieces: list[Piece] = []
    packed: list[Piece] = []
    num_bytes = 0
    for piece in bucket.pieces:
        spec = manifest.tensors[piece.tensor]
        first, last = elements_of(spec.shape, shard, num_shards)
        start, stop = max(piece.start, first), min(piece.stop, last)
        if start < stop:
            offset = piece.offset + (start - piece.start) * spec.itemsize
            pieces.append(Piece(piece.tensor, start, stop, offset))
            packed.append(Piece(piece.tensor, start, stop, num_bytes))
            num_bytes += _align((stop - start) * spec.itemsize)
    return Part(tuple(pieces), tuple(packed), num_bytes)


def elements_of(shape: Sequence[int], shard: int, num_shards: int) -> tuple[int, int]:
    """First element of a shard of such a tensor, and the one after its last."""
    num_rows, of_a_row = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    rows = rows_of_shard(num_rows, shard, num_shards)
    return rows.start * of_a_row, rows.end * of_a_row


def _cuts(spec: TensorSpec, bucket_bytes: int) -> list[tuple[int, int]]:
    """Element ranges of one tensor, each at most a bucket long; none for an empty tensor."""
    num_elements = math.prod(spec.shape)
    most = bucket_bytes // spec.itemsize
    return [(first, min(first + most, num_elements)) for first in range(0, num_elements, most)]


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
