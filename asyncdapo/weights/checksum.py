"""Checksum of the bytes of a transfer, computed where the bytes are (CPU or GPU), alike on both ends.

A bucket is read as 64-bit words in blocks of `BLOCK_ROWS` rows of `ROW_WORDS`. The sums of all rows and of all columns
of each block, modulo 2^64, and the words after the last full row go into BLAKE2b, bucket after bucket. So every change
of one word shows, and so do words or buckets that trade places; a change that leaves all row sums and all column sums
alone (at least four words at the corners of a rectangle) does not. It guards against accidents, not attackers.

Blocks fit a CPU's cache, so that memory is read once; 0.3 % of it is copied to the host and hashed.

Shape: U bytes (uint8).
"""

from __future__ import annotations

from hashlib import blake2b

import torch

ROW_WORDS = 1024
BLOCK_ROWS = 512
NUM_WORDS = 2
"""Length of a digest in int64 words."""


class Checksum:
    """Running checksum over the buckets of one transfer."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=8 * NUM_WORDS)

    def update(self, bucket_U: torch.Tensor) -> None:
        """Add a bucket: uint8 [U], U a multiple of 8, its start aligned to 8 bytes."""
        words = bucket_U.view(torch.int64)
        num_full = len(words) // ROW_WORDS * ROW_WORDS
        parts = [words[num_full:]]
        for block in words[:num_full].view(-1, ROW_WORDS).split(BLOCK_ROWS):
            parts += [block.sum(1), block.sum(0)]
        self._hash.update(torch.cat(parts).cpu().numpy())

    def digest(self) -> torch.Tensor:
        """int64 [NUM_WORDS] on the CPU."""
        return torch.frombuffer(bytearray(self._hash.digest()), dtype=torch.int64)
