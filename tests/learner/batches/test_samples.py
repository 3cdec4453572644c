"""From a batch to rows: which completions are trained on, with which numbers."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from asyncdapo.algorithm.advantages import batch_advantages
from asyncdapo.learner.batches.samples import columns, rows_by_update, weighted
from asyncdapo.messages import Context
from asyncdapo.transport.payload import Payload, expand
from tests.learner.tiny import batch_of, make_batch, make_group, make_row, payloads_of


def test_every_row_gets_its_own_part_of_the_payload():
    groups = [make_group(7, 2, [3, 1], [1.0, -1.0]), make_group(9, 1, [2, 2], [0.0, 3.0])]
    payload = Payload(
        prompt_ids=np.array([20, 21, 22], dtype=np.int32),
        token_ids=np.arange(8, dtype=np.int32),
        logprobs=-np.arange(8, dtype=np.float32),
    )
    batch = batch_of(groups)
    (rows,) = rows_by_update(batch, payloads_of(batch, payload), 0, batch_advantages("grpo"))
    assert [row.index for row in rows] == [0, 1, 2, 3]
    assert [row.prompt for row in rows] == [0, 0, 1, 1]
    assert [row.prompt_ids.tolist() for row in rows] == [[20, 21], [20, 21], [22], [22]]
    assert [row.token_ids.tolist() for row in rows] == [[0, 1, 2], [3], [4, 5], [6, 7]]
    assert [row.rollout_logprobs.tolist() for row in rows] == [[0, -1, -2], [-3], [-4, -5], [-6, -7]]
    assert [np.sign(row.advantage) for row in rows] == [1, -1, -1, 1]


def test_a_completion_without_loss_counts_in_the_mean_and_is_not_trained():
    masks = [[(1, 2)], [(0, 2)], [(1, 1), (0, 1)]]
    group = make_group(0, 1, [2, 2, 2], [1.0, 0.0, 0.5], loss_masks=masks)
    payload = Payload(np.zeros(1, np.int32), np.arange(6, dtype=np.int32), np.zeros(6, np.float32))
    batch = batch_of([group])
    (rows,) = rows_by_update(batch, payloads_of(batch, payload), 0, batch_advantages("grpo"))
    assert [row.index for row in rows] == [0, 2]
    assert [row.token_ids.tolist() for row in rows] == [[0, 1], [4, 5]]
    assert [row.loss_mask.tolist() for row in rows] == [[True, True], [True, False]]
    assert [row.advantage for row in rows] == pytest.approx([1.0, 0.0], abs=1e-5)  # mean 0.5, std 0.5 of all three


def test_run_lengths_become_a_number_for_each_token():
    assert expand([(1, 2), (0, 3), (1, 1)]).tolist() == [1, 1, 0, 0, 0, 1]


def test_the_rows_of_all_ranks_are_those_of_one_rank():
    batch, payload = make_batch(num_groups=4)
    (whole,) = rows_by_update(batch, payloads_of(batch, payload), 0, batch_advantages("grpo"))
    dealt = batch_of(batch.groups, num_ranks=3, num_updates=2)
    updates = [[] for _ in range(2)]
    for rank in range(3):
        rows = rows_by_update(dealt, payloads_of(dealt, payload, rank), rank, batch_advantages("grpo"))
        assert all(rows)
        for update, more in zip(updates, rows, strict=True):
            update += more
    for rows, same in zip(updates, (whole[:6], whole[6:]), strict=True):
        for row, expected in zip(sorted(rows, key=lambda row: row.index), same, strict=True):
            assert (row.index, row.context, row.advantage) == (expected.index, expected.context, expected.advantage)
            assert row.prompt_ids.tolist() == expected.prompt_ids.tolist()
            assert row.token_ids.tolist() == expected.token_ids.tolist()
            assert row.rollout_logprobs.tolist() == expected.rollout_logprobs.tolist()


def test_a_row_knows_how_stale_each_of_its_tokens_is_where_that_is_asked_for():
    group = make_group(0, 1, [5], [1.0], version=2)
    context = Context(sampled=[(1, 2), (0, 1), (1, 2)], versions=[(2, 3), (4, 1)], loss_mask=[(1, 4)], turns=[])
    completion = replace(group.completions[0], contexts=[context])
    batch = batch_of([replace(group, completions=[completion])], 6)
    payload = Payload(np.zeros(1, np.int32), np.arange(5, dtype=np.int32), np.zeros(4, np.float32))
    make = partial(rows_by_update, batch, [payload], 0, batch_advantages("grpo"))
    [[row]], [[bare]] = make(with_token_staleness=True), make()
    assert row.token_staleness.tolist() == [3, 3, 0, 3, 1]
    assert bare.token_staleness is None


def test_an_advantage_of_the_batch_is_the_same_at_every_rank():
    batch, payload = make_batch(num_groups=4)
    (whole,) = rows_by_update(batch, payloads_of(batch, payload), 0, batch_advantages("reinforce_pp"))
    assert sum(row.advantage for row in whole) == pytest.approx(0, abs=1e-9)
    dealt = batch_of(batch.groups, num_ranks=2)
    for rank in range(2):
        its_payloads = payloads_of(dealt, payload, rank)
        (rows,) = rows_by_update(dealt, its_payloads, rank, batch_advantages("reinforce_pp"))
        assert [row.advantage for row in rows] == [whole[row.index].advantage for row in rows]


def test_the_columns_of_a_batch_count_masks_and_copies():
    groups = [
        make_group(0, 1, [2, 3], [0.0, 1.0], loss_masks=[[(0, 2)], [(1, 2), (0, 1)]]),
        make_group(1, 1, [4, 1], [0, 1]),
    ]
    counted = columns(replace(batch_of(groups, num_updates=2), copies=[0, 2]))
    assert counted.group_N.tolist() == [0, 0, 1, 1]
    assert counted.num_tokens_N.tolist() == [0, 2, 4, 1]
    assert counted.copies_N.tolist() == [1, 1, 3, 3]
    assert counted.of_update(1).tolist() == [2, 3]


def test_rows_get_the_weight_of_their_completion():
    rows = [make_row(1, 1), dataclasses.replace(make_row(1, 1), index=5)]
    assert [row.weight for row in weighted(rows, torch.tensor([0, 5]), torch.tensor([0.5, 0.25]))] == [0.5, 0.25]
