"""The learner's ranks add up what they find: real processes over Gloo, and one killed in the middle."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from asyncdapo.errors import RanksError, RunError
from asyncdapo.learner.step import ranks as group
from asyncdapo.learner.step.ranks import ALONE, GradientGroup, Ranks
from tests.learner.ranks import die, in_processes, in_threads

SHAPES = [(300, 7), (1,), (64, 33), (), (0, 4), (5000,)]


def gradients_of(rank: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=draw) for shape in SHAPES]


def parameters_with(gradients: list[torch.Tensor | None]) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


def sum_own_gradients(ranks: Ranks) -> list[torch.Tensor]:
    """The first to arrive waits for the last."""
    time.sleep(0.2 * (ranks.num_ranks - ranks.rank))
    parameters = parameters_with(gradients_of(ranks.rank))
    ranks.sum_gradients(parameters)
    return [parameter.grad for parameter in parameters]


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


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_rank_has_the_sum_of_all_gradients_whoever_comes_first(num_ranks: int) -> None:
    outcomes = in_processes(num_ranks, sum_own_gradients)
    wanted = [sum(parts) for parts in zip(*map(gradients_of, range(num_ranks)), strict=True)]
    for gradients in outcomes:
        for got, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert all(torch.equal(got, first) for got, first in zip(gradients, outcomes[0], strict=True)), "bit by bit"


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


def test_a_rank_without_gradients_takes_part_and_has_the_sum_afterwards() -> None:
    def work(ranks: Ranks) -> list[torch.Tensor]:
        mine = gradients_of(0) if ranks.rank == 0 else [None] * len(SHAPES)
        parameters = parameters_with(mine)
        ranks.sum_gradients(parameters)
        return [parameter.grad for parameter in parameters]

    for gradients in in_threads(2, work):
        assert all(torch.equal(got, want) for got, want in zip(gradients, gradients_of(0), strict=True))


@pytest.mark.parametrize("bucket_bytes", [8, 64, 5000, 1 << 20])
def test_the_size_of_a_bucket_changes_nothing(bucket_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "BUCKET_BYTES", bucket_bytes)

    def work(ranks: Ranks) -> list[torch.Tensor]:
        parameters = [
            torch.nn.Parameter(torch.zeros(9, 5).t()),
            torch.nn.Parameter(torch.zeros(40, dtype=torch.float64)),
            torch.nn.Parameter(torch.zeros(3)),
        ]
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, 10.0**number) * (1 + ranks.rank)
            parameter.grad[..., -1] += 1
        ranks.sum_gradients(parameters)
        return [parameter.grad for parameter in parameters]

    for gradients in in_threads(2, work):
        for number, gradient in enumerate(gradients):
            want = torch.full_like(gradient, 3 * 10.0**number)
            want[..., -1] += 2
            assert torch.equal(gradient, want)


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


def test_a_late_rank_fails_the_sum_at_the_deadline_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "SYNC_TIMEOUT_S", 0.3)

    def work(ranks: Ranks) -> None:
        if ranks.rank == 0:
            ranks.sum(torch.ones(3))
        time.sleep(1.0)

    with pytest.raises(RanksError, match=r"rank 0 of 2 could not transfer: no end within 0.3 s"):
        in_threads(2, work)


def test_one_rank_alone_sums_nothing_and_needs_no_group() -> None:
    tensor = torch.ones(2)
    assert ALONE.sum(tensor) is tensor
    assert tensor.tolist() == [1, 1]
    parameter = torch.nn.Parameter(torch.zeros(2))
    ALONE.sum_gradients([parameter])
    assert parameter.grad.tolist() == [0, 0]  # as with several ranks: a parameter that nothing reached has zeros
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_on_a_gpu_are_summed_through_host_memory_where_ranks_share_it() -> None:
    def work(ranks: Ranks) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(torch.zeros(shape, device="cuda")) for shape in SHAPES]
        for parameter, gradient in zip(parameters, gradients_of(ranks.rank), strict=True):
            parameter.grad = gradient.to("cuda")
        ranks.sum_gradients(parameters)
        assert ranks.sum(torch.ones(2, device="cuda")).tolist() == [2.0, 2.0]
        return [parameter.grad for parameter in parameters]

    wanted = [sum(parts) for parts in zip(*map(gradients_of, range(2)), strict=True)]
    for gradients in in_threads(2, work):
        for got, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6)
