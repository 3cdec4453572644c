"""avg@k, pass@k and maj@k, against counting by hand and by brute force; what an evaluation's answers come to."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncdapo.controller.eval.sampled import at_k, avg_at_k, maj_at_k, pass_at_k, summarise, table
from asyncdapo.eval_messages import EvalAnswer


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


def test_a_sample_without_a_prediction_has_no_vote() -> None:
    assert maj_at_k([[None, None, "7"]], [[0, 0, 1]], k=3) == [1.0]
    assert maj_at_k([[None, None, "7"]], [[1, 0, 1]], k=2) == [0.0]
    assert maj_at_k([["", None, ""]], [[1, 0, 1]], k=3) == [1.0]


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.booleans()), min_size=1, max_size=6), max_size=4
    ).filter(lambda problems: len({len(samples) for samples in problems}) <= 1)
)
def test_maj_at_k_agrees_with_counting_by_hand(problems) -> None:
    for samples in problems:
        votes = [pred for pred, _ in samples if pred is not None]
        most = max(map(votes.count, votes), default=0)
        winner = next((pred for pred in votes if votes.count(pred) == most), None)
        expected = next((float(right) for pred, right in samples if winner is not None and pred == winner), 0.0)
        [got] = maj_at_k([[pred for pred, _ in samples]], [[right for _, right in samples]], k=len(samples))
        assert got == expected


def test_more_samples_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="4 of 3 samples"):
        avg_at_k([[1, 0, 1]], k=4)
    with pytest.raises(ValueError, match="pass@4 of 3 samples"):
        pass_at_k([3], [1], 4)
    with pytest.raises(ValueError, match="2 of 1 samples"):
        maj_at_k([["x"]], [[1]], k=2)


# ----------------------------------------------------------------------------------------- the answers of an evaluation


def answer(prompt_id: int, sample: int, acc: float, pred: str | None = None, num_tokens: int = 3) -> EvalAnswer:
    return EvalAnswer(
        prompt_id=prompt_id,
        sample=sample,
        acc=acc,
        pred=pred,
        num_tokens=num_tokens,
        finish_reason="length" if num_tokens == 9 else "stop",
        version_min=1,
        version_max=2,
    )


FOUR = [
    *(answer(0, sample, acc, pred) for sample, (acc, pred) in enumerate([(1, "7"), (0, "8"), (0, "8"), (0, None)])),
    *(answer(1, sample, acc, pred) for sample, (acc, pred) in enumerate([(0, "1"), (1, "2"), (1, "2"), (1, "2")])),
]
"""Four samples of each of two prompts."""


def test_the_table_has_a_row_for_each_power_of_two_and_for_all_samples() -> None:
    rows = table([*reversed(FOUR)])
    assert [row.k for row in rows] == [1, 2, 4]
    assert [row.avg for row in rows] == [0.5, 0.5, 0.5]
    assert [row.pass_ for row in rows] == [0.5, 0.75, 1.0]
    assert [row.maj for row in rows] == [0.5, 0.5, 0.5]
    assert [row.k for row in table([answer(0, sample, 1.0) for sample in range(6)])] == [1, 2, 4, 6]
    assert table([]) == []


def test_the_standard_error_is_that_of_the_mean_over_prompts() -> None:
    verdicts = [[1, 1], [0, 1], [0, 0], [1, 0]]
    answers = [answer(at, sample, acc) for at, accs in enumerate(verdicts) for sample, acc in enumerate(accs)]
    assert at_k(answers, 2).avg_stderr == pytest.approx(math.sqrt((0.25 + 0.25) / 3 / 4))
    assert math.isnan(at_k(answers[:2], 2).avg_stderr)


def test_part_of_the_credit_counts_in_the_mean_and_does_not_pass() -> None:
    row = at_k([answer(0, 0, 0.5), answer(0, 1, 0.75)], 2)
    assert (row.avg, row.pass_) == (0.625, 0.0)


def test_without_any_prediction_there_is_no_majority() -> None:
    answers = [answer(0, sample, 1.0) for sample in range(2)]
    assert at_k(answers, 2).maj is None
    assert "eval/maj@2" not in summarise(answers)


def test_numbers_of_environments_are_averaged_over_the_answers_that_have_them() -> None:
    own = [{"calls": 1.0, "checks": 2.0}, {"calls": 4.0}, {}]
    answers = [replace(answer(number, 0, 1.0), metrics=numbers) for number, numbers in enumerate(own)]
    summary = summarise(answers)
    assert (summary["eval/metrics/calls"], summary["eval/metrics/checks"]) == (2.5, 2.0)


def test_a_summary_names_what_several_samples_say_only_where_there_are_several() -> None:
    metrics = summarise(FOUR)
    several = {name: metrics[name] for name in ("eval/accuracy", "eval/pass@4", "eval/maj@4", "eval/num_prompts")}
    assert several == {"eval/accuracy": 0.5, "eval/pass@4": 1.0, "eval/maj@4": 0.5, "eval/num_prompts": 2}
    assert not any("@" in name for name in summarise([answer(0, 0, 1.0, "7")]))


def test_lengths_and_truncation_are_over_all_completions() -> None:
    metrics = summarise([answer(0, 0, 1.0, num_tokens=9), answer(0, 1, 1.0, num_tokens=1)])
    assert (metrics["eval/response_tokens_mean"], metrics["eval/response_tokens_max"]) == (5, 9)
    assert metrics["eval/truncated_ratio"] == 0.5


def test_answers_that_are_episodes_have_a_mean_number_of_turns() -> None:
    episode = replace(answer(0, 0, 1.0), response="abc", sampled=[(1, 1), (0, 1), (1, 1)])
    assert summarise([episode, answer(1, 0, 1.0)])["eval/turns_mean"] == 1.5
    assert "eval/turns_mean" not in summarise([answer(1, 0, 1.0)])
