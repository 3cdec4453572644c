"""Credits: what a worker asks for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.rollout.credits import Credits


def test_a_partly_free_group_counts_as_one() -> None:
    assert [asked_for(num_free_slots) for num_free_slots in (-3, 0, 1, 16, 17, 64)] == [0, 0, 1, 1, 2, 4]


def test_the_same_room_is_never_asked_for_twice() -> None:
    credits = Credits(group_size=4)
    assert credits.ask(8)
    assert not credits.ask(8)
    credits.resume_from(1)
    assert not credits.ask(4)
    assert credits.ask(8)
    assert credits.asked == 3


def test_grants_lost_on_the_way_are_room_again() -> None:
    credits = Credits(group_size=4)
    credits.ask(8)
    credits.resume_from(granted=2)
    assert credits.ask(8)
    assert (credits.asked, credits.granted) == (4, 2)


@given(st.permutations([1, 1, 2, 3, 3, 0, 0]))
def test_grants_that_come_twice_late_or_without_a_number_count_once(numbers: list[int]) -> None:
    credits = Credits(group_size=4)
    credits.ask(16)
    for number in numbers:
        credits.resume_from(number)
    assert not credits.ask(4)
    assert (credits.asked, credits.granted) == (4, 3)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20))))
def test_slots_are_filled_and_no_more_than_one_group_waits(steps: list[tuple[int, int]]) -> None:
    num_slots, group_size, num_outstanding, credits = 12, 4, 0, Credits(group_size=4)
    for num_grants, num_finished in steps:
        credits.ask(num_slots - num_outstanding)
        owed = credits.asked - credits.granted
        assert num_slots <= num_outstanding + owed * group_size < num_slots + group_size
        num_grants = min(num_grants, owed)
        credits.resume_from(credits.granted + num_grants)
        num_outstanding += num_grants * group_size
        num_outstanding -= min(num_finished, num_outstanding)


def asked_for(num_free_slots: int) -> int:
    credits = Credits(group_size=16)
    credits.ask(num_free_slots)
    return credits.asked
