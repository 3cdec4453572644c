"""From a batch to rows: which completions are trained on, with which numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from asyncdapo.algorithm.dapo import group_advantage
from asyncdapo.learner.batches.samples import columns, expand_mask, group_rows, weighted
from asyncdapo.messages import Batch
from asyncdapo.payload import Payload
from tests.learner.tiny import make_batch, make_group, make_row


def test_every_row_gets_its_own_part_of_the_payload():
    groups = [make_group(7, 2, [3, 1], [1.0, -1.0]), make_group(9, 1, [2, 2], [0.0, 3.0])]
    payload = Payload(
        prompt_ids=np.array([20, 21, 22], dtype=np.int32),
        token_ids=np.arange(8, dtype=np.int32),
        logprobs=-np.arange(8, dtype=np.float32),
    )
    batch = Batch(step=1, branch=0, max_staleness=0, groups=groups)
    first, second = group_rows(batch, payload, [0, 1], group_advantage).values()
    assert [row.index for row in first + second] == [0, 1, 2, 3]
    assert [row.prompt_ids.tolist() for row in first + second] == [[20, 21], [20, 21], [22], [22]]
    assert [row.token_ids.tolist() for row in first + second] == [[0, 1, 2], [3], [4, 5], [6, 7]]
    assert [row.rollout_logprobs.tolist() for row in first + second] == [[0, -1, -2], [-3], [-4, -5], [-6, -7]]
    assert [np.sign(row.advantage) for row in first + second] == [1, -1, -1, 1]


def test_a_completion_without_loss_counts_in_the_mean_and_is_not_trained():
    masks = [[(1, 2)], [(0, 2)], [(1, 1), (0, 1)]]
    group = make_group(0, 1, [2, 2, 2], [1.0, 0.0, 0.5], loss_masks=masks)
    payload = Payload(np.zeros(1, np.int32), np.arange(6, dtype=np.int32), np.zeros(6, np.float32))
    batch = Batch(step=1, branch=0, max_staleness=0, groups=[group])
    (rows,) = group_rows(batch, payload, [0], group_advantage).values()
    assert [row.index for row in rows] == [0, 2]
    assert [row.token_ids.tolist() for row in rows] == [[0, 1], [4, 5]]
    assert [row.loss_mask.tolist() for row in rows] == [[True, True], [True, False]]
    assert [row.advantage for row in rows] == pytest.approx([1.0, 0.0], abs=1e-5)  # mean 0.5, std 0.5 of all three


def test_run_lengths_become_a_mask():
    assert expand_mask([(1, 2), (0, 3), (1, 1)]).tolist() == [True, True, False, False, False, True]


def test_a_share_has_the_payload_of_its_groups_and_the_indices_of_the_whole_batch():
    batch, payload = make_batch(num_groups=4)
    whole = group_rows(batch, payload, [0, 1, 2, 3], group_advantage)
    parts = payload.split(batch.groups)
    share = group_rows(batch, Payload.join([parts[1], parts[3]]), [1, 3], group_advantage)
    assert list(share) == [1, 3]
    for place, rows in share.items():
        assert [row.index for row in rows] == [row.index for row in whole[place]]
        for row, same in zip(rows, whole[place], strict=True):
            assert row.token_ids.tolist() == same.token_ids.tolist()
            assert row.advantage == same.advantage


def test_the_columns_of_a_batch_count_masks_and_copies():
    groups = [
        make_group(0, 1, [2, 3], [0.0, 1.0], loss_masks=[[(0, 2)], [(1, 2), (0, 1)]]),
        make_group(1, 1, [4, 1], [0, 1]),
    ]
    counted = columns(Batch(step=1, branch=0, max_staleness=0, groups=groups, copies=[0, 2]))
    assert counted.group_N.tolist() == [0, 0, 1, 1]
    assert counted.num_tokens_N.tolist() == [0, 2, 4, 1]
    assert counted.copies_N.tolist() == [1, 1, 3, 3]
    assert counted.of_groups([1]).tolist() == [2, 3]


def test_rows_get_the_weight_of_their_completion():
    rows = [make_row(1, 1), replace(make_row(1, 1), index=5)]
    assert [row.weight for row in weighted(rows, torch.tensor([0, 5]), torch.tensor([0.5, 0.25]))] == [0.5, 0.25]
