"""Admission: the rule, its lemma, the order of the stream, and which worker gets the lease."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.admission import Admission
from asyncdapo.replay.core.leases import Leases
from asyncdapo.replay.core.recovery import KnownWorker, Recovered
from asyncdapo.replay.core.staleness import StalenessBound
from asyncdapo.replay.core.stream import PromptStream
from asyncdapo.replay.core.waits import gauges, why_waiting
from tests.replay.scenario import Scenario, grants_of, group_done, stop_of

NOTHING = {"in_training": 0, "queued": 0, "running": 0, "keep_rate": 1.0, "verdicts": 0}


@pytest.mark.parametrize(
    ("run_ahead", "ahead", "admitted"),
    [
        (0, {"queued": 3}, True),
        (0, {"queued": 4}, False),
        (0, {"queued": 2, "running": 2}, False),
        (0, {"queued": 2, "running": 3, "keep_rate": 0.5}, True),
        (0, {"queued": 2, "running": 4, "keep_rate": 0.5}, False),
        (1, {"in_training": 4, "queued": 3}, True),
        (1, {"in_training": 4, "queued": 4}, False),
        (0.5, {"in_training": 4, "queued": 1}, True),
        (0.5, {"in_training": 4, "queued": 2}, False),
    ],
)
def test_a_prompt_is_leased_while_less_is_ahead_than_run_ahead_allows(
    run_ahead: float, ahead: dict, admitted: bool
) -> None:
    rule = Admission(prompts_per_step=4, run_ahead=run_ahead)
    assert rule.admits(**(NOTHING | ahead)) is admitted


@given(
    size=st.integers(1, 600),
    run_ahead=st.floats(0, 8),
    keep_rate=st.floats(0.1, 1),
    data=st.data(),
)
def test_lemma_with_nothing_in_training_or_running_a_batch_that_is_not_full_admits_a_lease(
    size: int, run_ahead: float, keep_rate: float, data: st.DataObject
) -> None:
    queued = data.draw(st.integers(0, size - 1))
    rule = Admission(prompts_per_step=size, run_ahead=run_ahead)
    assert rule.admits(in_training=0, queued=queued, running=0, keep_rate=keep_rate, verdicts=queued)


@given(run_ahead=st.sampled_from([0, 0.5, 1, 2]), size=st.integers(1, 8), data=st.data())
def test_lemma_one_fit_worker_with_one_credit_at_a_time_fills_any_batch(
    run_ahead: float, size: int, data: st.DataObject
) -> None:
    scenario = Scenario(ReplayConfig(prompts_per_step=size, run_ahead=run_ahead, max_staleness=2))
    scenario.join()
    scenario.tell(core.BatchWanted(step=1))
    verdicts = data.draw(st.permutations(["kept"] * size + ["constant"] * 9))
    for verdict in verdicts:
        if not scenario.batches:
            scenario.tell(core.Ready(worker=0, credits=1))
            assert len(scenario.running) == 1, "nothing runs and the batch isn't full, so a prompt is leased"
            scenario.finish(*scenario.running, verdict=verdict)
    assert len(scenario.batches[0]) == size


def test_what_is_in_training_falls_when_its_weights_are_published() -> None:
    scenario = Scenario(ReplayConfig(prompts_per_step=2, run_ahead=0.5, max_staleness=1))
    scenario.join(credits=9)
    scenario.tell(core.BatchWanted(step=1))
    scenario.finish(0, 1)
    assert scenario.batches == [[0, 1]]
    assert scenario.running == [2]
    scenario.tell(core.Trained(step=1))
    assert scenario.running == [2]
    scenario.tell(core.Published(version=1))
    assert scenario.running == [2, 3, 4]


def test_a_worker_is_granted_no_more_than_its_credits() -> None:
    scenario = Scenario(ReplayConfig(prompts_per_step=8, run_ahead=1, max_staleness=1))
    scenario.join(credits=3)
    assert len(scenario.running) == 3
    assert why_waiting(scenario.state) == "learner: has not asked for batch 1"
    scenario.tell(core.BatchWanted(step=1))
    scenario.finish(0, 1, 2)
    assert why_waiting(scenario.state) == "rollout: no free slot, 3 of 8 ready"


def test_leases_are_spread_over_the_workers_with_most_room() -> None:
    scenario = Scenario(ReplayConfig(prompts_per_step=3, run_ahead=0, max_staleness=0))
    scenario.tell(core.WorkerJoined(worker=0, loaded_version=0), core.WorkerJoined(worker=1, loaded_version=0))
    scenario.tell(core.Ready(worker=0, credits=1), core.Ready(worker=1, credits=4))
    assert [(grant.prompt_id, grant.worker) for grant in grants_of(scenario.actions)] == [(0, 0), (1, 1), (2, 1)]


@pytest.mark.parametrize(("num_leases", "slow_gets"), [(3, 0), (8, 3), (12, 5), (16, 8)])
def test_while_leases_are_scarce_a_slow_worker_gets_less_and_else_all_that_it_can_start(
    num_leases: int, slow_gets: int
) -> None:
    workers = {index: KnownWorker(session="", loaded_version=0) for index in (0, 1)}
    leases = Leases(StalenessBound(0), lambda action: None, Recovered(workers=workers))
    for index, pace in ((0, 0.5), (1, 1.0)):
        leases.note_ready(index, 8, pace)
    for prompt_id in range(num_leases):
        worker = leases.worker_for_next(1)
        assert worker is not None
        leases.grant(prompt_id, worker, 1, step=1)
    assert sum(lease.worker == 0 for lease in leases.running.values()) == slow_gets


def test_the_keep_rate_lets_more_prompts_run_when_many_are_filtered() -> None:
    scenario = Scenario(ReplayConfig(prompts_per_step=4, run_ahead=0, max_staleness=0))
    scenario.join(credits=99)
    assert scenario.running == [0, 1, 2, 3]
    scenario.finish(0, 1, 2, 3, verdict="constant")
    assert gauges(scenario.state)["keep_rate"] == 0.5
    assert len(scenario.running) == 8


def test_with_the_filter_off_no_more_runs_than_a_batch_takes() -> None:
    off = FilterConfig(enabled=False)
    scenario = Scenario(ReplayConfig(prompts_per_step=4, run_ahead=0, max_staleness=0), off)
    scenario.join(credits=99)
    scenario.finish(0, 1, 2, 3, verdict="constant")
    assert scenario.running == []
    assert gauges(scenario.state)["keep_rate"] == 1.0


def test_prompts_that_came_back_go_first_and_those_of_lost_leases_behind_a_batch_of_fresh_ones() -> None:
    stream = PromptStream(num_prompts=None, delay=2)
    assert [stream.take() for _ in range(4)] == [0, 1, 2, 3]
    stream.put_behind(1)
    stream.put_back(3)
    stream.put_back(2)
    assert [stream.take() for _ in range(6)] == [2, 3, 4, 5, 1, 6]


def test_prompts_of_leases_lost_together_come_back_apart() -> None:
    stream = PromptStream(num_prompts=None, delay=2)
    assert [stream.take() for _ in range(3)] == [0, 1, 2]
    for prompt_id in (0, 1, 2):
        stream.put_behind(prompt_id)
    assert [stream.take() for _ in range(9)] == [3, 4, 0, 5, 6, 1, 7, 8, 2]


def test_when_the_stream_ends_what_came_back_is_still_leased() -> None:
    stream = PromptStream(num_prompts=2, delay=5)
    assert [stream.take(), stream.take(), stream.next] == [0, 1, None]
    stream.put_behind(0)
    assert stream.next == 0
    assert stream.take() == 0
    assert stream.next is None


def test_a_prompt_whose_workers_die_is_leased_behind_others_and_ends_failed() -> None:
    scenario = Scenario(ReplayConfig(prompts_per_step=2, run_ahead=1, max_staleness=1), max_attempts=2)
    scenario.join(credits=1)
    scenario.tell(core.WorkerLost(worker=0))
    assert scenario.reasons(0) == [("leased", ""), ("waiting", "worker lost")]
    scenario.join(credits=4)
    assert [grant.prompt_id for grant in grants_of(scenario.actions)] == [0, 1, 2, 0, 3]
    scenario.tell(core.WorkerLost(worker=0))
    assert scenario.state_of(0) == "failed"
    assert [scenario.state_of(prompt_id) for prompt_id in (1, 2, 3)] == ["waiting"] * 3


def test_a_prompt_whose_reward_function_raises_ends_failed_at_once() -> None:
    scenario = Scenario(ReplayConfig(prompts_per_step=1, run_ahead=0, max_staleness=0))
    scenario.join(credits=1)
    scenario.tell(core.LeaseFailed(lease_id=scenario.lease_of(0)))
    assert scenario.state_of(0) == "failed"
    assert scenario.state.handle(core.LeaseFailed(lease_id=1))[0].outcome == "late"


def test_a_group_that_comes_twice_counts_once() -> None:
    scenario = Scenario(ReplayConfig(prompts_per_step=4, run_ahead=0, max_staleness=0))
    scenario.join(credits=1)
    lease_id = scenario.lease_of(0)
    scenario.finish(0)
    for _ in range(2):
        assert [action.outcome for action in scenario.tell(group_done(lease_id))] == ["late"]
    assert gauges(scenario.state)["queued"] == 1


def test_when_the_data_is_used_up_the_run_stops_after_the_last_batch_is_trained() -> None:
    scenario = Scenario(ReplayConfig(prompts_per_step=2, run_ahead=1, max_staleness=1), num_prompts=3)
    scenario.join(credits=9)
    scenario.tell(core.BatchWanted(step=1))
    scenario.finish(0, 1, 2)
    assert scenario.batches == [[0, 1]]
    assert stop_of(scenario.tell(core.BatchWanted(step=2))) is None
    assert why_waiting(scenario.state) == "learner: trains step 1"
    stop = stop_of(scenario.tell(core.Trained(step=1)))
    assert (stop.error, stop.reason) == (False, "the data is used up: 1 kept groups are left")
    assert why_waiting(scenario.state) == "run over"
    scenario.tell(core.RunEnded())
    assert [scenario.state_of(prompt_id) for prompt_id in range(3)] == ["trained", "trained", "unused"]


def test_when_the_data_is_used_up_partial_trains_on_a_last_short_batch() -> None:
    partial = FilterConfig(on_limit="partial")
    scenario = Scenario(ReplayConfig(prompts_per_step=2, run_ahead=1, max_staleness=1), partial, num_prompts=3)
    scenario.join(credits=9)
    scenario.tell(core.BatchWanted(step=1))
    scenario.finish(0, 1, 2)
    scenario.tell(core.BatchWanted(step=2))
    assert scenario.batches == [[0, 1], [2]]
    scenario.train(1)
    scenario.train(2)
    assert stop_of(scenario.tell(core.BatchWanted(step=3))).error is False


def test_without_any_worker_the_wait_says_so() -> None:
    scenario = Scenario(ReplayConfig(prompts_per_step=2, run_ahead=1, max_staleness=1))
    scenario.tell(core.BatchWanted(step=1))
    assert why_waiting(scenario.state) == "no live worker"
