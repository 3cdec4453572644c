"""Mixture: the part of the data that each position of the stream is drawn from. Pure.

    weights 3 and 1      blocks of 4 positions: exactly 3 from part 0 and 1 from part 1
    block 0   0 1 0 0    each block has its own order, from a hash of the seed
    block 1   0 0 0 1
    place     0 0 1 2 │ 3 4 5 1     number of earlier draws from the same part

In: weights, seed, a position. Out: the part and the place in it, so that each part has its own epochs; and the inverse.
Any position can be computed at any time; nothing is saved. Does not own: which row a place stands for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from asyncdapo.errors import ConfigError
from asyncdapo.seeds import sample_seed

MAX_BLOCK = 10_000
"""Most positions in a block. The weights hold exactly within each block."""
BLOCK_SALT = 0xB10C
"""Separates the hash of a block's order from that of an epoch's order: both hash the same numbers."""


class Mixture:
    """Assigns positions to parts by weight. With a single part each position is its own place."""

    def __init__(self, weights: Sequence[Fraction], seed: int) -> None:
        """Raises ConfigError if the weights, as the smallest whole numbers, add up to more than MAX_BLOCK."""
        self._counts = whole_numbers(weights)
        self._size = sum(self._counts)
        self._seed = seed
        if self._size > MAX_BLOCK:
            ratio = " : ".join(f"{count:,}" for count in self._counts)
            problem = f"the weights are in the ratio {ratio}, of more than {MAX_BLOCK:,} parts"
            raise ConfigError("prompts.path", problem, [float(weight) for weight in weights], "round them")

    def draw(self, position: int) -> tuple[int, int]:
        """The part of this position, and the number of earlier positions of the same part."""
        block, offset = divmod(position, self._size)
        part, rank = block_order(self._counts, self._seed, block)[offset]
        return part, block * self._counts[part] + rank

    def position(self, part: int, place: int) -> int:
        """The inverse of `draw`: the position of this part's draw number `place`, from 0."""
        block, rank = divmod(place, self._counts[part])
        return block * self._size + block_order(self._counts, self._seed, block).index((part, rank))


def whole_numbers(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of the weights."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * scale) for weight in weights]
    return tuple(number // math.gcd(*numbers) for number in numbers)


@lru_cache(maxsize=8)
def block_order(counts: tuple[int, ...], seed: int, block: int) -> tuple[tuple[int, int], ...]:
    """(part, rank within the block) of each position of a block: sorted by a hash, ranks rising within a part."""
    parts = [part for part, count in enumerate(counts) for _ in range(count)]
    order = sorted(range(len(parts)), key=lambda index: sample_seed(seed, BLOCK_SALT, block, index))
    drawn = [0] * len(counts)
    places = []
    for part in (parts[index] for index in order):
        places.append((part, drawn[part]))
        drawn[part] += 1
    return tuple(places)
