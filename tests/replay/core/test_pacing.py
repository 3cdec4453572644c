"""`run_ahead: auto`: as few batches ahead as keep either side from waiting, in simulated time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.errors import ConfigError
from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.admission import RESERVE, Pacing
from benchmarks.paced.loads import LOADS, Load
from benchmarks.paced.simulation import Result, Simulation
from tests.replay.scenario import Scenario

AUTO = ReplayConfig(prompts_per_step=16, run_ahead="auto", max_staleness=4)
GROUPS = st.floats(-100, 100)


def simulate(load: Load, config: ReplayConfig, steps: int = 30) -> Result:
    return Simulation(load, config, FilterConfig(), seed=1).run(steps)


@given(st.lists(st.tuples(GROUPS, GROUPS), min_size=4, max_size=30), st.integers(1, 8), st.integers(1, 16))
def test_it_is_what_one_of_the_sides_needed_most_lately_and_never_beyond_the_bound(measured, bound, size) -> None:
    pacing = Pacing(ReplayConfig(prompts_per_step=size, run_ahead="auto", max_staleness=bound), measured)
    assert 0 <= pacing.run_ahead <= bound
    for needs in zip(*measured[-12:], strict=True):
        assert pacing.run_ahead <= max(0, max(needs) / size - 1 + RESERVE), "one side doesn't wait: more is of no use"


@pytest.mark.parametrize(("bound", "begins_with"), [(1, 1.0), (2, 1.5), (4, 2.0), (8, 2.0)])
def test_it_begins_with_two_or_halfway_to_a_tight_bound_and_falls_after_four_steps(bound, begins_with) -> None:
    pacing = Pacing(ReplayConfig(prompts_per_step=4, run_ahead="auto", max_staleness=bound))
    in_force = [pacing.run_ahead]
    for step in range(1, 5):
        pacing.note(4)
        pacing.end_step(step, ready=4)
        in_force.append(pacing.run_ahead)
    assert in_force == [begins_with] * 4 + [RESERVE]


@given(st.sampled_from([0.0, 0.5, 2.0]), st.floats(0, 50), st.integers(0, 50))
def test_a_number_is_left_as_it_is(run_ahead: float, ahead: float, ready: int) -> None:
    pacing = Pacing(ReplayConfig(run_ahead=run_ahead, max_staleness=2))
    pacing.note(ahead)
    assert pacing.end_step(1, ready) is None
    assert pacing.run_ahead == run_ahead


def test_groups_that_the_learner_lacks_when_it_wants_them_raise_it_and_idle_slots_limit_that() -> None:
    """At the end of step 1 the learner lacks two of the four groups that it wants. The worker could have started one
    more, so that is what it takes for one of them not to wait."""
    scenario = Scenario(ReplayConfig(prompts_per_step=4, run_ahead="auto", max_staleness=3))
    scenario.join(credits=8)
    scenario.tell(core.BatchWanted(step=1))
    scenario.finish(0, 1, 2, 3)
    scenario.finish(4, 5)
    scenario.tell(core.Ready(worker=0, credits=5))
    [measured] = [a for a in scenario.train(1) if isinstance(a, core.PaceMeasured)]
    assert (measured.of_workers, measured.of_learner) == (13, 14)
    assert measured.run_ahead == scenario.state.admission.run_ahead == 13 / 4 - 1 + RESERVE


@pytest.mark.parametrize("name", LOADS)
def test_no_load_takes_longer_than_with_the_best_number_and_none_is_staler_than_with_the_largest(name: str) -> None:
    fixed = [simulate(LOADS[name], replace(AUTO, run_ahead=run_ahead)) for run_ahead in (1.0, 2.0, 4.0)]
    auto = simulate(LOADS[name], AUTO)
    assert auto.wall_s <= 1.03 * min(result.wall_s for result in fixed)
    assert auto.mean_staleness <= fixed[-1].mean_staleness
    if name == "learner-bound":
        assert auto.mean_staleness < 0.5 * fixed[-1].mean_staleness


def test_it_comes_down_again_once_the_learner_is_the_slower_side() -> None:
    simulation = Simulation(LOADS["balanced"], AUTO, FilterConfig(), seed=1)
    simulation.run(15)
    before = simulation.state.admission.run_ahead
    simulation.load = LOADS["learner-bound"]
    simulation.run(30)
    assert simulation.state.admission.run_ahead < before


def test_without_room_for_staleness_there_is_nothing_to_measure() -> None:
    with pytest.raises(ConfigError, match=r"replay.run_ahead: has nothing to choose from"):
        ReplayConfig(run_ahead="auto", max_staleness=0)
