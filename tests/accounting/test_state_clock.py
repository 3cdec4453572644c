from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.accounting.clock import StateClock


class Watch:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def __call__(self) -> float:
        return self.time_s


def test_time_belongs_to_the_state_entered_last():
    watch = Watch()
    clock = StateClock(watch)
    watch.time_s += 7  # nobody's: no state was entered yet
    clock.enter("wait")
    watch.time_s += 2
    clock.enter("train")
    watch.time_s += 3
    clock.enter("wait")
    watch.time_s += 1
    assert clock.totals() == {"wait": 3.0, "train": 3.0}


def test_each_take_starts_anew_and_knows_every_state():
    watch = Watch()
    clock = StateClock(watch)
    clock.enter("wait")
    watch.time_s += 2
    clock.enter("train")
    watch.time_s += 3
    assert clock.take() == {"wait": 2.0, "train": 3.0}
    watch.time_s += 4
    assert clock.take() == {"wait": 0.0, "train": 4.0}
    assert clock.totals() == {"wait": 2.0, "train": 7.0}


steps = st.lists(
    st.tuples(st.floats(0, 1e4), st.sampled_from(["wait", "train", "publish", "take", "totals"])), max_size=40
)


@given(steps)
def test_states_sum_to_the_time_that_passed_in_total_and_between_takes(steps: list[tuple[float, str]]):
    watch = Watch()
    clock = StateClock(watch)
    clock.enter("start")
    began_s = taken_at_s = watch.time_s
    for seconds, what in steps:
        watch.time_s += seconds
        if what == "take":
            assert math.isclose(sum(clock.take().values()), watch.time_s - taken_at_s, abs_tol=1e-6)
            taken_at_s = watch.time_s
        elif what == "totals":
            assert math.isclose(sum(clock.totals().values()), watch.time_s - began_s, abs_tol=1e-6)
        else:
            clock.enter(what)
    assert math.isclose(sum(clock.totals().values()), watch.time_s - began_s, abs_tol=1e-6)
    assert all(seconds >= 0 for seconds in clock.totals().values())
