"""Averages against a naive one over the update in which every copy is written out."""

from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.algorithm.averages import AGGREGATIONS, aggregation_weights

MAX_LENGTH = 8


def naive_average(agg, losses, groups, max_length):
    """`losses`: the token losses of each completion, lists of floats; `groups`: the prompt of each."""
    with_tokens = [tokens for tokens in losses if tokens]
    if not with_tokens:
        return 0.0
    flat = [loss for tokens in losses for loss in tokens]
    if agg == "token-mean":
        return sum(flat) / len(flat)
    if agg == "token-sum":
        return sum(flat)
    if agg == "prompt-mean":
        by_prompt = defaultdict(list)
        for group, tokens in zip(groups, losses, strict=True):
            by_prompt[group] += tokens
        means = [sum(tokens) / len(tokens) for tokens in by_prompt.values() if tokens]
        return sum(means) / len(means)
    divisor = {
        "seq-mean-token-sum": lambda tokens: 1,
        "seq-mean-token-mean": len,
        "seq-mean-token-sum-norm": lambda tokens: max_length,
    }[agg]
    return sum(sum(tokens) / divisor(tokens) for tokens in with_tokens) / len(with_tokens)


def weigh(agg, losses, groups, copies):
    """The loss as the learner forms it: a weight for each completion."""
    weights_N = aggregation_weights(
        agg,
        torch.tensor([len(tokens) for tokens in losses], dtype=torch.int64),
        torch.tensor(groups, dtype=torch.int64),
        torch.tensor(copies, dtype=torch.int64),
        max_response_length=MAX_LENGTH,
    )
    assert weights_N.dtype == torch.float64
    return sum(weight * sum(tokens) for weight, tokens in zip(weights_N.tolist(), losses, strict=True))


completions = st.lists(st.lists(st.floats(-5, 5), max_size=MAX_LENGTH), max_size=4)
updates = st.lists(st.tuples(completions, st.integers(1, 3)), max_size=4)
"""Groups of an update: the token losses of each completion, and how often the group stands in the update."""


@pytest.mark.parametrize("agg", AGGREGATIONS)
@given(groups=updates)
def test_an_average_is_that_of_the_update_in_which_copies_stand_one_by_one(agg, groups):
    losses = [tokens for group, _ in groups for tokens in group]
    ids = [index for index, (group, _) in enumerate(groups) for _ in group]
    copies = [count for group, count in groups for _ in group]
    written_out = [
        ((index, copy), tokens) for index, (group, n) in enumerate(groups) for copy in range(n) for tokens in group
    ]
    naive = naive_average(agg, [tokens for _, tokens in written_out], [group for group, _ in written_out], MAX_LENGTH)
    assert weigh(agg, losses, ids, copies) == pytest.approx(naive, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_a_completion_without_a_token_changes_no_average(agg):
    losses, groups = [[1.0, 2.0], [4.0], [-1.0] * 8], [0, 0, 1]
    with_empty = weigh(agg, [*losses, [], []], [*groups, 1, 2], [1] * 5)
    assert with_empty == pytest.approx(weigh(agg, losses, groups, [1] * 3))


@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_an_update_without_any_token_has_finite_weights(agg):
    no_tokens_N = torch.zeros(3, dtype=torch.int64)
    weights_N = aggregation_weights(agg, no_tokens_N, no_tokens_N, no_tokens_N + 1, max_response_length=MAX_LENGTH)
    assert torch.isfinite(weights_N).all()


def test_a_group_of_which_only_a_part_is_copied_has_no_mean_over_prompts():
    ones_N = torch.ones(2, dtype=torch.int64)
    copies_N = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="equally often"):
        aggregation_weights("prompt-mean", ones_N, ones_N, copies_N, max_response_length=MAX_LENGTH)
