"""avg@k, pass@k and maj@k, against counting by hand and by brute force."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import pytest

from asyncdapo.controller.sampled import avg_at_k, maj_at_k, pass_at_k


def test_avg_at_k_is_the_mean_of_each_problems_first_k_verdicts() -> None:
    assert avg_at_k([[1, 0, 0, 1], [0.5, 1, 1, 0]], k=2) == [0.5, 0.75]
    assert avg_at_k([[1.0], [0.0]], k=1) == [1.0, 0.0]


@pytest.mark.parametrize("num_right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_choices_of_k_with_a_right_one(num_right: int, k: int) -> None:
    verdicts = [True] * num_right + [False] * (5 - num_right)
    assert pass_at_k([5], [num_right], k) == [fmean(any(chosen) for chosen in combinations(verdicts, k))]


def test_pass_at_k_keeps_its_digits_for_large_n() -> None:
    assert pass_at_k([10**6], [1], 3) == [3e-6]
    assert pass_at_k([20_000], [19_999], 10_000) == [1.0]
    assert pass_at_k([20_000], [1], 5_000) == [0.25]


def test_maj_at_k_takes_the_verdict_of_the_most_frequent_prediction() -> None:
    predictions = [["7", "8", "7"], ["a", "b", "b"]]
    assert maj_at_k(predictions, [[1, 0, 1], [1, 0, 0]], k=3) == [1.0, 0.0]


def test_of_equally_frequent_predictions_the_first_seen_wins() -> None:
    assert maj_at_k([["b", "a", "a", "b"]], [[1, 0, 0, 1]], k=4) == [1.0]
    assert maj_at_k([["b", "a", "a", "a"]], [[1, 0, 0, 0]], k=2) == [1.0]


def test_more_samples_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="4 of 3 samples"):
        avg_at_k([[1, 0, 1]], k=4)
    with pytest.raises(ValueError, match="pass@4 of 3 samples"):
        pass_at_k([3], [1], 4)
    with pytest.raises(ValueError, match="2 of 1 samples"):
        maj_at_k([["x"]], [[1]], k=2)
