"""Checksum of the bytes of a transfer, computed where they are (CPU or GPU), the same way at both ends.

A bucket is read as rows of `ROW_WORDS` 64-bit words. The sum of each row, modulo 2^64, goes into BLAKE2b, and so do the
words after the last full row, in order, bucket after bucket. So it detects every change of one word, and rows or
buckets that are lost, repeated or swapped. It misses a change within one row (1 KiB) that keeps the row's sum. It
guards against accidents, not attackers.

Memory is read once, at full speed; 0.8 % of it is copied to the host and hashed.

Shape: U bytes (uint8).
"""

from __future__ import annotations

from hashlib import blake2b
from struct import unpack

import torch

ROW_WORDS = 128
NUM_WORDS = 2
"""Length of a checksum."""


class Checksum:
    """Running checksum over the buckets of one transfer."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=8 * NUM_WORDS)

    def update(self, bucket_U: torch.Tensor) -> None:
        """Add a bucket: uint8 [U], U a multiple of 8, its start aligned to 8 bytes."""
        words = bucket_U.view(torch.int64)
        num_full = len(words) // ROW_WORDS * ROW_WORDS
        sums = words[:num_full].view(-1, ROW_WORDS).sum(1)
        self._hash.update(torch.cat([sums, words[num_full:]]).cpu().numpy().data)

    def words(self) -> list[int]:
        """`NUM_WORDS` words of 64 bits, signed."""
        return list(unpack(f"<{NUM_WORDS}q", self._hash.digest()))
