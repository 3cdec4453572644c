"""CRC-32 in C: the numbers of zlib."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from asyncdapo.native import crc32 as native
from asyncdapo.native.crc32 import BLOCK_BYTES, SMALL, crc32

CONTENT = np.random.default_rng(0).bytes(8 * SMALL)


@pytest.mark.parametrize("before", [0, 1, 0xFFFFFFFF, zlib.crc32(b"what was before")])
def test_the_number_is_that_of_zlib_for_every_size_place_and_number_before(before: int) -> None:
    for num_bytes in (0, 1, BLOCK_BYTES, SMALL - 1, *range(SMALL, SMALL + 2 * BLOCK_BYTES)):
        for begin in (0, 1, 7):
            piece = memoryview(CONTENT)[begin : begin + num_bytes]
            assert crc32(piece, before) == zlib.crc32(piece, before), (num_bytes, begin)


def test_pieces_one_after_the_other_give_the_number_of_the_whole() -> None:
    crc = 0
    for begin in range(0, len(CONTENT), SMALL + 3):
        crc = crc32(CONTENT[begin : begin + SMALL + 3], crc)
    assert crc == zlib.crc32(CONTENT)


def test_arrays_of_numbers_are_read_as_bytes() -> None:
    numbers = np.frombuffer(CONTENT, np.int32)
    assert crc32(numbers.data) == zlib.crc32(CONTENT)


def test_without_a_library_zlib_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: None)
    assert crc32(CONTENT, 5) == zlib.crc32(CONTENT, 5)
