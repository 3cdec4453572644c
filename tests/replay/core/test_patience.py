"""`on_stale: auto`: long answers aren't lost to the bound, and few of them are worth a learner that stands still."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.recovery import Recovered, Totals
from asyncdapo.replay.core.staleness import Patience
from asyncdapo.replay.core.state import ReplayState
from benchmarks.paced.loads import LONG_ANSWERS
from benchmarks.paced.simulation import Simulation, bias
from tests.replay.scenario import group_done

COUNTS = st.integers(0, 1000)


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 100))
def test_a_cut_that_ends_groups_leaves_the_dropped_below_one_percent_and_has_waited(
    dropped: int, judged: int, arrived: int, overdue: int
) -> None:
    patience = Patience(dropped, judged)
    patience.arrived = arrived
    if not patience.waits_for(overdue):
        assert dropped + overdue <= 0.01 * (dropped + overdue + judged) + 1e-9
        assert arrived >= overdue
    assert not patience.waits_for(0)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=200), st.data())
def test_lengths_are_biased_by_no_more_than_the_share_that_is_dropped(lengths: list[int], data: st.DataObject) -> None:
    dropped = data.draw(st.integers(0, len(lengths) - 1))
    shuffled = data.draw(st.permutations(lengths))
    assert bias(shuffled[dropped:], shuffled) <= dropped / len(lengths) + 1e-9


@pytest.mark.parametrize(("on_stale", "biased"), [("drop", True), ("auto", False)])
def test_the_lengths_trained_on_are_those_sampled_under_auto_and_shorter_under_drop(on_stale, biased: bool) -> None:
    """Longer answers are wrong more often, and the longest take more than a train step at the tightest bound."""
    config = ReplayConfig(prompts_per_step=16, run_ahead=1, max_staleness=1, on_stale=on_stale)
    simulation = Simulation(LONG_ANSWERS, config, FilterConfig(), seed=0)
    simulation.run(50)
    trained, sampled = simulation.lengths()
    assert (bias(trained, sampled) > 0.02) is biased
    assert (sum(trained) / len(trained) < 0.95 * sum(sampled) / len(sampled)) is biased


def test_a_cut_waits_until_as_many_groups_have_arrived_as_it_would_end() -> None:
    """Late in a run, when dropping two groups biases nothing."""
    config = ReplayConfig(prompts_per_step=2, run_ahead=1, max_staleness=1, on_stale="auto")
    late = Recovered(totals=Totals(verdicts=1000))
    state = ReplayState(config, FilterConfig(), max_attempts=3, num_prompts=None, recovered=late)

    def tell(*events: core.Event) -> list[core.Action]:
        return [action for event in events for action in state.handle(event)]

    tell(core.WorkerJoined(worker=0, loaded_version=0), core.Ready(worker=0, credits=4), core.BatchWanted(step=1))
    tell(*(core.SamplingBegan(lease_id=lease_id, version=0) for lease_id in (3, 4)), group_done(1), group_done(2))
    tell(core.WeightsLoaded(worker=0, version=1), core.Trained(step=1), core.Published(version=1))
    tell(core.Ready(worker=0, credits=4), core.BatchWanted(step=2))
    tell(group_done(5, min_version=1), group_done(6, min_version=1))
    assert state.next_batch.step == 2, "3 and 4 would miss batch 3, and nothing has arrived since batch 2 was full"
    actions = tell(group_done(3))
    assert state.next_batch.step == 3, "4 is no longer worth it"
    assert [a.outcome for a in actions if isinstance(a, core.EndLease) and a.lease_id == 4] == ["withdrawn"]
