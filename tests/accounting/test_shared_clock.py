"""Where a process's time goes: states that exclude each other, whatever overlaps, and sum to the wall time."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.accounting.clock import SharedClock

STATES = ("wait", "gradient", "sum", "publish", "checkpoint")


class Watch:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def __call__(self) -> float:
        return self.time_s

    def go(self, seconds: float) -> None:
        self.time_s += seconds


def begun() -> tuple[SharedClock, Watch]:
    watch = Watch()
    times = SharedClock(STATES, watch)
    times.begin()
    return times, watch


def spent(times: SharedClock) -> dict[str, float]:
    return {state: seconds for state, seconds in times.take().items() if seconds}


def test_time_inside_a_span_is_the_inner_one_s() -> None:
    times, watch = begun()
    with times.on("gradient"):
        watch.go(1)
        with times.on("sum"):
            watch.go(2)
        watch.go(4)
    watch.go(8)
    assert spent(times) == {"gradient": 5, "sum": 2, "other": 8}
    assert spent(times) == {}


def test_of_two_that_overlap_the_one_that_began_last_has_the_time() -> None:
    times, watch = begun()
    wait, publish = times.on("wait"), times.on("publish")
    wait.__enter__()
    watch.go(1)
    publish.__enter__()
    watch.go(2)
    wait.__exit__(None, None, None)
    watch.go(4)
    publish.__exit__(None, None, None)
    watch.go(8)
    assert spent(times) == {"wait": 1, "publish": 6, "other": 8}


def test_weights_sent_beside_a_gradient_take_the_time_that_it_leaves() -> None:
    times, watch = begun()
    gradient, publish = times.on("gradient"), times.on("publish", beside=True)
    publish.__enter__()
    watch.go(1)
    gradient.__enter__()
    watch.go(2)
    with times.on("checkpoint", beside=True):
        watch.go(4)
    gradient.__exit__(None, None, None)
    watch.go(8)
    publish.__exit__(None, None, None)
    assert spent(times) == {"publish": 9, "gradient": 6}


def test_nothing_counts_before_the_beginning_and_a_second_one_changes_nothing() -> None:
    watch = Watch()
    times = SharedClock(STATES, watch)
    with times.on("publish"):
        watch.go(1)
        times.begin()
        watch.go(2)
        times.begin()
    watch.go(4)
    assert spent(times) == {"publish": 2, "other": 4}


def test_a_span_ends_with_an_error_too() -> None:
    times, watch = begun()
    with pytest.raises(ValueError, match="in it"), times.on("checkpoint"):
        watch.go(1)
        raise ValueError("in it")
    watch.go(2)
    assert spent(times) == {"checkpoint": 1, "other": 2}


@given(st.lists(st.tuples(st.sampled_from(STATES), st.integers(1, 9), *[st.booleans()] * 3)))
def test_the_states_of_a_step_sum_to_its_wall_time_whatever_overlaps(moves: list) -> None:
    times, watch = begun()
    taken_at, stack = watch.time_s, []
    for state, seconds, closes, takes, beside in moves:
        if closes and stack:
            stack.pop(seconds % len(stack)).__exit__(None, None, None)
        else:
            stack.append(times.on(state, beside=beside))
            stack[-1].__enter__()
        watch.go(seconds)
        if takes:
            assert sum(times.take().values()) == watch.time_s - taken_at
            taken_at = watch.time_s
    for span in stack:
        span.__exit__(None, None, None)
    assert sum(times.take().values()) == watch.time_s - taken_at


def test_threads_share_one_account() -> None:
    times, watch = begun()
    with ExitStack() as stack:
        stack.enter_context(times.on("wait"))

        def send() -> None:
            with times.on("publish"):
                watch.go(2)

        thread = threading.Thread(target=send)
        thread.start()
        thread.join()
        watch.go(1)
    assert spent(times) == {"publish": 2, "wait": 1}
