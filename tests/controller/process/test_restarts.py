"""Deaths are forgiven now and then, not again and again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.controller.process.restarts import FIRST_DELAY_S, MAX_DELAY_S, RECENT_S, WINDOW_S, Restarts
from asyncdapo.errors import RunError

DEATH = RunError("rollout-0: the process died: killed")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_death_past_the_budget_ends_the_run_with_its_cause_and_the_key_that_allows_more():
    restarts = Restarts(2, Clock())
    for _ in range(2):
        restarts.delay_s("rollout-0", DEATH)
    with pytest.raises(RunError, match=r"process died: killed .*number 3 within an hour; controller.max_restarts is 2"):
        restarts.delay_s("rollout-0", DEATH)


def test_without_a_budget_the_first_death_ends_the_run():
    with pytest.raises(RunError, match="controller.max_restarts is 0"):
        Restarts(0, Clock()).delay_s("replay", DEATH)


def test_processes_have_budgets_of_their_own():
    restarts = Restarts(1, Clock())
    for name in ("rollout-0", "rollout-1", "learner"):
        assert restarts.delay_s(name, DEATH) == 0.0
    with pytest.raises(RunError, match="number 2"):
        restarts.delay_s("learner", DEATH)


@given(st.lists(st.floats(1, 3 * WINDOW_S), min_size=1, max_size=60), st.integers(0, 5))
def test_a_run_ends_exactly_when_one_more_death_than_allowed_falls_into_a_window(gaps, max_restarts):
    clock, restarts, deaths = Clock(), Restarts(max_restarts, lambda: clock.now), []
    for gap in gaps:
        clock.now += gap
        deaths.append(clock.now)
        recent = [at for at in deaths if at > clock.now - WINDOW_S]
        if len(recent) > max_restarts:
            with pytest.raises(RunError):
                restarts.delay_s("learner", DEATH)
            return
        delay_s = restarts.delay_s("learner", DEATH)
        assert (delay_s == 0) == (len(deaths) == 1 or gap >= RECENT_S)
        assert delay_s <= MAX_DELAY_S


def test_a_start_waits_longer_after_each_death_of_the_last_minute_and_not_at_all_after_a_quiet_one():
    clock, restarts = Clock(), Restarts(99, lambda: clock.now)
    delays = [restarts.delay_s("rollout-0", DEATH) for _ in range(4)]
    assert delays == [0.0, FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S]
    clock.now += RECENT_S
    assert restarts.delay_s("rollout-0", DEATH) == 0.0
