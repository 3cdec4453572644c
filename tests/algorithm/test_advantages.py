"""Advantages against naive references in plain floats."""

import pytest
import torch

from asyncdapo.algorithm.advantages import ADVANTAGES, BATCH_ADVANTAGES, batch_advantages
from asyncdapo.learner.config import ADVANTAGES as IN_CONFIG


def test_the_advantages_differ_by_what_they_divide_by_and_compare_with():
    rewards_G = torch.tensor([3.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert ADVANTAGES["dr_grpo"](rewards_G).tolist() == [2.0, -1.0, 0.0, -1.0]
    assert ADVANTAGES["rloo"](rewards_G).tolist() == pytest.approx([3 - 1 / 3, -4 / 3, 0, -4 / 3])
    assert ADVANTAGES["grpo"](rewards_G).tolist() == pytest.approx([v / 2**0.5 for v in (2, -1, 0, -1)], rel=1e-5)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [-1.0], [1e8, 1e8]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_that_is_constant_or_alone_has_advantage_exactly_zero(advantage, rewards, dtype):
    assert ADVANTAGES[advantage](torch.tensor(rewards, dtype=dtype)).tolist() == [0.0] * len(rewards)


def test_the_config_knows_every_advantage():
    assert set(IN_CONFIG) == ADVANTAGES.keys() | BATCH_ADVANTAGES.keys()


def test_under_maximum_likelihood_a_hard_prompt_counts_by_its_pass_rate():
    one_of_four, three_of_four = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, 1, 1, 0])
    assert ADVANTAGES["maxrl"](one_of_four).tolist() == [3.0, -1.0, -1.0, -1.0]
    assert ADVANTAGES["maxrl"](three_of_four).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1.0])
    assert ADVANTAGES["maxrl"](torch.zeros(4)).tolist() == [0.0] * 4


@pytest.mark.parametrize("advantage", BATCH_ADVANTAGES)
def test_a_copied_group_counts_as_often_in_the_statistics_of_the_batch(advantage):
    rewards = [torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)]
    counted = batch_advantages(advantage)(rewards, [1, 2])
    written_out = batch_advantages(advantage)([rewards[0], rewards[1], rewards[1]], [1, 1, 1])
    for one, other in zip(counted, written_out, strict=False):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("advantage", BATCH_ADVANTAGES)
def test_a_batch_of_equal_rewards_teaches_nothing(advantage):
    equal = [torch.full((3,), 0.1), torch.full((2,), 0.1)]
    assert [of_group.tolist() for of_group in batch_advantages(advantage)(equal, [1, 1])] == [[0.0] * 3, [0.0] * 2]


def test_only_against_the_batch_has_a_constant_group_an_advantage():
    groups = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])]
    of_constant = {name: batch_advantages(name)(groups, [1, 1])[0].tolist() for name in IN_CONFIG}
    assert [name for name, values in of_constant.items() if any(values)] == ["reinforce_pp"]
