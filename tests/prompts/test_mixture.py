"""Mixtures: exact shares, random access both ways, weights that can't be."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.errors import ConfigError
from asyncdapo.prompts.config import PromptsConfig
from asyncdapo.prompts.mixture import Mixture, whole_numbers

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def mixture(counts, seed=0):
    return Mixture([Fraction(count) for count in counts], seed)


@given(counts=COUNTS, seed=st.integers(0, 2**62), block=st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_every_block_holds_the_weights_exactly(counts, seed, block):
    counts = whole_numbers([Fraction(count) for count in counts])
    size = sum(counts)
    parts = [mixture(counts, seed).draw(position)[0] for position in range(block * size, (block + 1) * size)]
    assert [parts.count(part) for part in range(len(counts))] == list(counts)


@given(counts=COUNTS, seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_the_places_of_a_part_are_counted_without_a_gap(counts, seed):
    dealt = mixture(counts, seed)
    draws = [dealt.draw(position) for position in range(100)]
    for part in range(len(counts)):
        places = [place for drawn, place in draws if drawn == part]
        assert places == list(range(len(places)))


@given(counts=COUNTS, seed=st.integers(0, 2**62), position=st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_position_is_the_inverse_of_draw(counts, seed, position):
    dealt = mixture(counts, seed)
    assert dealt.position(*dealt.draw(position)) == position


def test_with_a_single_part_every_position_is_its_place():
    dealt = mixture([7], seed=5)
    assert [dealt.draw(position) for position in (0, 1, 99, 10**12)] == [(0, 0), (0, 1), (0, 99), (0, 10**12)]


def test_the_order_differs_between_blocks_and_seeds():
    def order(seed, block):
        dealt = mixture([20, 11], seed)
        return tuple(dealt.draw(31 * block + offset)[0] for offset in range(31))

    assert len({order(seed, block) for seed in (0, 1) for block in (0, 1)}) == 4


@pytest.mark.parametrize(
    ("written", "numbers"),
    [
        ((3.0, 1.0), (3, 1)),
        ((0.7, 0.3), (7, 3)),
        ((0.5, 0.25), (2, 1)),
        ((30.0, 10.0), (3, 1)),
        ((1e-3, 1.0), (1, 1000)),
    ],
)
def test_weights_are_the_numbers_that_are_written(written, numbers):
    config = PromptsConfig(task="file", path={f"{i}.jsonl": weight for i, weight in enumerate(written)})
    assert whole_numbers(list(config.weights.values())) == numbers


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ({"a.jsonl": 0.33333, "b.jsonl": 0.66667}, "the weights are in the ratio .*more than 10,000.*round"),
        ({"a.jsonl": 0, "b.jsonl": 1}, "prompts.path: the weight of a.jsonl must be a number above 0, got 0"),
        ({"a.jsonl": float("nan")}, "the weight of a.jsonl must be a number above 0, got nan"),
        ({"a.jsonl": 1, "./a.jsonl": 2}, "prompts.path: names one file twice.*add up"),
        ({}, "prompts.path: the task 'file' needs a data file"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(path, words):
    with pytest.raises(ConfigError, match=words):
        PromptsConfig(task="file", path=path)
