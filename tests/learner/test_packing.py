"""From a batch to micro-batches: which rows, in which rectangles, with which numbers in them."""

import numpy as np
import pytest
import torch

from asyncdapo.learner.packing import Row, expand_mask, group_rows, micro_batches, mini_batches, pad
from asyncdapo.messages import Batch, Payload
from tests.learner.tiny import make_batch, make_group


def make_row(num_prompt_tokens, num_tokens, advantage=1.0):
    return Row(
        prompt_ids=np.arange(num_prompt_tokens, dtype=np.int32),
        token_ids=np.arange(num_tokens, dtype=np.int32),
        rollout_logprobs=-np.ones(num_tokens, dtype=np.float32),
        loss_mask=np.ones(num_tokens, dtype=bool),
        advantage=advantage,
    )


def test_every_row_gets_its_own_part_of_the_payload():
    groups = [make_group(7, 2, [3, 1], [1.0, -1.0]), make_group(9, 1, [2, 2], [0.0, 3.0])]
    payload = Payload(
        prompt_ids=np.array([20, 21, 22], dtype=np.int32),
        token_ids=np.arange(8, dtype=np.int32),
        logprobs=-np.arange(8, dtype=np.float32),
    )
    first, second = group_rows(Batch(step=1, branch=0, max_staleness=0, groups=groups), payload)
    assert [row.prompt_ids.tolist() for row in first + second] == [[20, 21], [20, 21], [22], [22]]
    assert [row.token_ids.tolist() for row in first + second] == [[0, 1, 2], [3], [4, 5], [6, 7]]
    assert [row.rollout_logprobs.tolist() for row in first + second] == [[0, -1, -2], [-3], [-4, -5], [-6, -7]]
    assert [np.sign(row.advantage) for row in first + second] == [1, -1, -1, 1]


def test_a_completion_without_loss_counts_in_the_mean_and_is_not_trained():
    masks = [[(1, 2)], [(0, 2)], [(1, 1), (0, 1)]]
    group = make_group(0, 1, [2, 2, 2], [1.0, 0.0, 0.5], loss_masks=masks)
    payload = Payload(np.zeros(1, np.int32), np.arange(6, dtype=np.int32), np.zeros(6, np.float32))
    (rows,) = group_rows(Batch(step=1, branch=0, max_staleness=0, groups=[group]), payload)
    assert [row.token_ids.tolist() for row in rows] == [[0, 1], [4, 5]]
    assert [row.loss_mask.tolist() for row in rows] == [[True, True], [True, False]]
    assert [row.advantage for row in rows] == pytest.approx([1.0, 0.0], abs=1e-5)  # mean 0.5, std 0.5 of all three


def test_run_lengths_become_a_mask():
    assert expand_mask([(1, 2), (0, 3), (1, 1)]).tolist() == [True, True, False, False, False, True]


def test_a_micro_batch_puts_prompt_and_response_in_front_and_padding_behind():
    packed = pad([make_row(2, 3, advantage=0.5), make_row(1, 2, advantage=-2.0)])
    assert packed.tokens_BT.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 0]]
    assert packed.loss_mask_BT.long().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert packed.rollout_logprobs_BT.tolist() == [[0, 0, -1, -1, -1], [0, -1, -1, 0, 0]]
    assert packed.advantages_B.tolist() == [0.5, -2.0]


@pytest.mark.parametrize("max_tokens", [1, 16, 40, 10_000])
def test_micro_batches_hold_every_row_once_within_the_budget(max_tokens):
    batch, payload = make_batch(num_groups=6, seed=1)
    rows = [row for rows in group_rows(batch, payload) for row in rows]
    packed = micro_batches(rows, max_tokens)
    assert sum(len(micro_batch.tokens_BT) for micro_batch in packed) == len(rows)
    assert sum(int(micro_batch.loss_mask_BT.sum()) for micro_batch in packed) == sum(
        row.num_loss_tokens for row in rows
    )
    assert all(micro.num_padded_tokens <= max_tokens or len(micro.tokens_BT) == 1 for micro in packed)
    widths = [micro_batch.tokens_BT.shape[1] for micro_batch in packed]
    assert widths == sorted(widths, reverse=True)
    first = micro_batches(rows, max_tokens)[0]
    assert torch.equal(first.tokens_BT, packed[0].tokens_BT)


def test_mini_batches_never_cut_a_group_and_differ_by_one_group_at_most():
    groups = [[make_row(1, index + 1)] * 3 for index in range(7)]
    updates = mini_batches(groups, 3)
    assert [[row.num_loss_tokens for row in rows][::3] for rows in updates] == [[1, 2, 3], [4, 5], [6, 7]]
    assert all(len(rows) % 3 == 0 for rows in updates)


def test_groups_without_rows_make_no_update_of_their_own():
    rows = [make_row(1, 2)]
    assert mini_batches([rows, [], []], 2) == [rows]
    assert mini_batches([[], []], 2) == []
