"""From rows to packed micro-batches: which rows, in which order, with which numbers in them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.learner.model.packing import Work, micro_batches, num_computed, pack
from tests.learner.tiny import make_row

CPU = torch.device("cpu")


def test_a_prompt_stands_once_before_the_responses_of_its_group():
    packed = pack([make_row(2, 3, prompt=4), make_row(2, 4, prompt=4), make_row(3, 2, prompt=5)], CPU)
    assert packed.tokens_S.tolist() == [0, 1, 0, 1, 0, 1, 2, 0, 1, 2, 0]
    assert packed.positions_S.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 3]


def test_a_token_is_predicted_from_the_output_before_it_the_first_one_from_its_prompts_last():
    packed = pack([make_row(2, 3, prompt=4), make_row(2, 2, prompt=4), make_row(3, 1, prompt=5)], CPU)
    assert packed.sources_n.tolist() == [1, 2, 3, 1, 4, 7]
    assert packed.targets_n.tolist() == [0, 1, 2, 0, 1, 0]


def test_columns_stand_at_the_tokens_of_the_responses_and_are_zero_behind_them():
    found = {"start_logprobs": np.array([-1.0, -2.0]), "correction": np.array([0.5, 2.0])}
    packed = pack([make_row(2, 2, 0.5, **found), make_row(1, 2, -2.0, weight=0.1, prompt=1, **found)], CPU)
    assert packed.start_logprobs_BT.tolist() == [[-1, -2], [-1, -2]]
    assert packed.correction_BT.tolist() == [[0.5, 2], [0.5, 2]]
    assert packed.reference_logprobs_BT is None
    assert packed.advantages_B.tolist() == [0.5, -2.0]
    assert packed.weights_B.tolist() == [1.0, 0.1]
    uneven = pack([make_row(2, 3), make_row(2, 1)], CPU)
    assert uneven.rollout_logprobs_BT.tolist() == [[-1, -1, -1], [-1, 0, 0]]
    assert uneven.loss_mask_BT.tolist() == [[True, True, True], [True, False, False]]


def test_logits_are_computed_for_loss_bearing_tokens_only_and_come_back_to_their_cells():
    packed = pack([make_row(2, 3, loss_mask=np.array([True, False, True])), make_row(2, 2)], CPU)
    assert packed.targets_n.tolist() == [0, 2, 0, 1]
    assert packed.rectangle(torch.tensor([5.0, 6.0, 7.0, 8.0])).tolist() == [[5, 0, 6], [7, 8, 0]]
    assert packed.flat(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).tolist() == [1, 3, 4, 5]
    assert packed.flat(torch.tensor([[1.0], [2.0]])).tolist() == [1, 1, 2, 2]


def test_work_counts_what_was_delivered_computed_and_attended_to():
    work = pack([make_row(3, 3), make_row(3, 1), make_row(2, 2, prompt=1)], CPU).work
    assert work.num_tokens == 6 + 4 + 4
    assert work.num_computed_tokens == 3 + 2 + 0 + 2 + 1
    assert work.num_loss_tokens == 6
    assert work.num_pairs == (1 + 2 + 3) + (4 + 5) + (1 + 2) + 3
    assert work + Work(1, 2, 3, 4) == Work(*(a + b for a, b in zip(work.counts, (1, 2, 3, 4), strict=True)))


GROUPS = st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 60), min_size=1, max_size=6)), max_size=8)


def rows_of(groups):
    return [
        make_row(num_prompt, num_tokens, prompt=group)
        for group, (num_prompt, responses) in enumerate(groups)
        for num_tokens in responses
    ]


def bundles_of(chunk):
    groups = dict.fromkeys(row.prompt for row in chunk)
    return [[row for row in chunk if row.prompt == group] for group in groups]


@settings(deadline=None)
@given(GROUPS, st.integers(1, 300))
def test_micro_batches_hold_every_row_once_within_the_budget_and_groups_side_by_side(groups, max_tokens):
    rows = rows_of(groups)
    chunks = micro_batches(rows, max_tokens)
    assert sorted(id(row) for chunk in chunks for row in chunk) == sorted(map(id, rows))
    for chunk in chunks:
        assert [row.prompt for row in chunk] == [row.prompt for bundle in bundles_of(chunk) for row in bundle]
        assert sum(map(num_computed, bundles_of(chunk))) <= max_tokens or len(chunk) == 1
        assert pack(chunk, CPU).work.num_computed_tokens == sum(map(num_computed, bundles_of(chunk)))


def test_parts_of_a_group_that_meet_in_a_micro_batch_share_the_prompt():
    rows = rows_of([(1, [61, 56, 41, 11]), (1, [15])])
    chunks = micro_batches(rows, 100)
    assert [[row.num_tokens - 1 for row in chunk] for chunk in chunks] == [[56, 41], [61, 11, 15]]
    assert pack(chunks[1], CPU).work.num_computed_tokens == (1 + 60 + 10) + (1 + 14)


@settings(deadline=None)
@given(GROUPS, st.integers(1, 300))
def test_micro_batches_follow_from_groups_and_lengths_alone(groups, max_tokens):
    again = micro_batches(rows_of(groups), max_tokens)
    for chunk, same in zip(micro_batches(rows_of(groups), max_tokens), again, strict=True):
        assert [(row.prompt, row.num_tokens) for row in chunk] == [(row.prompt, row.num_tokens) for row in same]


def test_micro_batches_are_about_equally_large():
    rng = np.random.default_rng(0)
    rows = [make_row(10, int(num), prompt=group) for group in range(64) for num in rng.integers(20, 60, 8)]
    sizes = [pack(chunk, CPU).work.num_computed_tokens for chunk in micro_batches(rows, 2048)]
    assert max(sizes) <= 2048
    assert min(sizes) > 0.8 * max(sizes)


def test_the_others_are_equally_large_where_a_row_is_longer_than_the_budget():
    groups = [(1, [num]) for num in (300, 20, 20, 20, 20, 20, 20)]
    sizes = [pack(chunk, CPU).work.num_computed_tokens for chunk in micro_batches(rows_of(groups), 100)]
    assert sizes == [300, 60, 60]


@pytest.mark.parametrize("max_tokens", [1, 70, 10_000])
def test_a_group_larger_than_the_budget_is_spread_and_each_part_has_the_prompt(max_tokens):
    rows = [make_row(20, 30) for _ in range(5)]
    sizes = [pack(chunk, CPU).work.num_computed_tokens for chunk in micro_batches(rows, max_tokens)]
    assert sum(sizes) == 5 * 29 + 20 * len(sizes)
    assert len(sizes) == {1: 5, 70: 5, 10_000: 1}[max_tokens]
