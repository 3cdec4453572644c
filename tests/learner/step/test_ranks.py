"""The learner's ranks add up what they find: real processes over Gloo, and one killed in the middle."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from asyncdapo.errors import RanksError, RunError
from asyncdapo.learner.step import ranks as group
from asyncdapo.learner.step.ranks import ALONE, GradientGroup, Ranks
from tests.learner.ranks import die, in_processes, in_threads, with_shards


def sum_of_each_kind(ranks: Ranks) -> list[torch.Tensor]:
    numbers = [
        torch.tensor([0.1 * (ranks.rank + 1), 1e-12], dtype=torch.float64),
        torch.tensor([[1.5, -2.0], [ranks.rank, 0.0]]).t(),
        torch.tensor(2**40 + ranks.rank),
    ]
    for number in numbers:
        assert ranks.sum(number) is number
    return numbers


def die_before_the_sum(ranks: Ranks, victim: int) -> float | None:
    """How long the others waited for the dead."""
    ranks.sum(torch.ones(3))
    if ranks.rank == victim:
        die()
    began_s = time.monotonic()
    try:
        for _ in range(2):  # a sum may still pass at ranks that had what they needed of the dead one
            ranks.sum(torch.ones(1 << 20))
    except RanksError:
        return time.monotonic() - began_s
    return None


def test_sums_are_in_place_for_floats_and_ints_of_any_layout() -> None:
    for floats, halves, ints in in_processes(2, sum_of_each_kind):
        torch.testing.assert_close(floats, torch.tensor([0.3, 2e-12], dtype=torch.float64), rtol=1e-15, atol=0)
        assert halves.tolist() == [[3.0, 1.0], [-4.0, 0.0]]
        assert ints.item() == 2**41 + 1


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_fails_the_others_at_once(victim: int) -> None:
    outcomes = in_processes(3, die_before_the_sum, victim)
    assert outcomes.pop(victim) is None
    assert all(waited_s is not None and waited_s < group.SYNC_TIMEOUT_S / 100 for waited_s in outcomes), outcomes


def test_ranks_with_the_same_digest_continue_and_another_one_is_named_everywhere() -> None:
    def check(digest_of: Callable[[Ranks], int | bytes]) -> list[str]:
        def work(ranks: Ranks) -> str:
            try:
                ranks.check_same(digest_of(ranks), "weights")
            except RunError as error:
                return str(error)
            return ""

        return in_threads(3, work)

    assert check(lambda ranks: 2**200) == ["", "", ""]
    assert check(lambda ranks: b"weights") == ["", "", ""]
    named = "the learner's ranks [2] have other weights than rank 0"
    assert check(lambda ranks: 7 + (ranks.rank == 2)) == [named] * 3


def test_replicas_of_a_shard_are_compared_and_not_the_shards() -> None:
    def check(words: list[int]) -> list[str]:
        def work(ranks: Ranks) -> str:
            try:
                with_shards(ranks, 2).check_same(words[ranks.rank], "weights")
            except RunError as error:
                return str(error)
            return ""

        return in_threads(4, work)

    assert check([1, 2, 1, 2]) == [""] * 4
    assert check([1, 2, 1, 3]) == ["the learner's ranks [3] have other weights than rank 1"] * 4


def test_the_largest_number_of_all_ranks_is_known_to_each() -> None:
    assert in_threads(3, lambda ranks: ranks.largest(7 - ranks.rank)) == [7, 7, 7]


def test_a_late_rank_fails_the_sum_at_the_deadline_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "SYNC_TIMEOUT_S", 0.3)

    failed = threading.Event()

    def work(ranks: Ranks) -> None:
        if ranks.rank == 0:
            try:
                ranks.sum(torch.ones(3))
            finally:
                failed.set()
        assert failed.wait(60)

    with pytest.raises(RanksError, match=r"rank 0 of 2 could not transfer: no end within 0.3 s"):
        in_threads(2, work)


def test_one_rank_alone_sums_nothing_and_needs_no_group() -> None:
    tensor = torch.ones(2)
    assert ALONE.sum(tensor) is tensor
    assert tensor.tolist() == [1, 1]
    assert ALONE.largest(3) == 3
    ALONE.check_same(1, "weights")


def test_a_rank_sums_only_through_a_group_of_its_place() -> None:
    with pytest.raises(RanksError, match="rank 1 of 2 has joined no group yet"):
        Ranks(1, 2).sum(torch.ones(1))
    host = GradientGroup.create_master("127.0.0.1", 3, "gloo", 1.0)
    with pytest.raises(ValueError, match="rank 0 of 2 can't be rank 0 of 3"):
        Ranks(0, 2).join(host)
    host.close()
    with pytest.raises(ValueError, match="rank 2 is none of 2"):
        Ranks(2, 2)
