from __future__ import annotations

import pytest
import torch

from asyncdapo.weights.checksum import ROW_WORDS, Checksum

NUM_BYTES = 8 * (3 * ROW_WORDS + 5)


def digest(*buckets: torch.Tensor) -> list[int]:
    checksum = Checksum()
    for bucket in buckets:
        checksum.update(bucket)
    return checksum.words()


def random_bytes(num_bytes: int = NUM_BYTES) -> torch.Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_the_same_bytes_have_the_same_digest():
    assert digest(random_bytes()) == digest(random_bytes().clone())


@pytest.mark.parametrize("place", [0, 7, 8 * ROW_WORDS, NUM_BYTES - 41, NUM_BYTES - 1])
@pytest.mark.parametrize("bit", [1, 128])
def test_one_flipped_bit_changes_the_digest(place: int, bit: int):
    flipped = random_bytes()
    flipped[place] ^= bit
    assert digest(flipped) != digest(random_bytes())


@pytest.mark.parametrize(("one", "other"), [(0, ROW_WORDS), (1, 2 * ROW_WORDS), (5, 3 * ROW_WORDS + 1)])
def test_words_of_two_rows_that_trade_places_or_lose_the_same_bit_change_the_digest(one: int, other: int):
    words = random_bytes().view(torch.int64)
    swapped = words.clone()
    swapped[[one, other]] = words[[other, one]]
    signs = words.clone()
    signs[[one, other]] ^= -(1 << 63)
    assert digest(swapped.view(torch.uint8)) != digest(words.view(torch.uint8))
    assert digest(signs.view(torch.uint8)) != digest(words.view(torch.uint8))


@pytest.mark.parametrize(("one", "other"), [(0, 1), (0, 2), (1, 2)])
def test_rows_that_trade_places_or_come_twice_change_the_digest(one: int, other: int):
    rows = random_bytes().view(torch.int64)[: 3 * ROW_WORDS].view(3, ROW_WORDS)
    swapped, repeated = rows.clone(), rows.clone()
    swapped[[one, other]] = rows[[other, one]]
    repeated[other] = rows[one]
    for changed in (swapped, repeated):
        assert digest(changed.reshape(-1).view(torch.uint8)) != digest(rows.reshape(-1).view(torch.uint8))


def test_buckets_that_trade_places_change_the_digest():
    first, second = random_bytes().clone(), random_bytes().flip(0)
    assert digest(first, second) != digest(second, first)


def test_zeros_of_another_length_have_another_digest():
    assert digest(torch.zeros(64, dtype=torch.uint8)) != digest(torch.zeros(128, dtype=torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_agree():
    assert digest(random_bytes().cuda()) == digest(random_bytes())
