"""The staleness bound: what fits, what is over after a cut, and what `on_stale` makes of it."""

from __future__ import annotations

import pytest

from asyncdapo.errors import StalenessError
from asyncdapo.messages import staleness
from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.staleness import StalenessBound
from asyncdapo.replay.core.waits import why_waiting
from tests.replay.scenario import Scenario, group_done


def tight(on_stale: str, *, size: int = 1, max_attempts: int = 3) -> Scenario:
    """Bound 1: a group of version 0 may be trained on in batch 1 and 2."""
    config = ReplayConfig(prompts_per_step=size, run_ahead=1, max_staleness=1, on_stale=on_stale)
    return Scenario(config, max_attempts=max_attempts)


def test_staleness_counts_the_train_steps_since_the_oldest_token() -> None:
    assert [staleness(step, min_version=0) for step in (1, 2, 3)] == [0, 1, 2]
    assert staleness(8, min_version=7) == 0


@pytest.mark.parametrize(("bound", "oldest"), [(0, 4), (1, 3), (2, 2), (9, 0)])
def test_the_oldest_version_fits_and_the_one_before_does_not(bound: int, oldest: int) -> None:
    rule = StalenessBound(bound)
    assert rule.oldest_version(5) == oldest
    assert rule.fits(oldest, 5)
    assert oldest == 0 or not rule.fits(oldest - 1, 5)


def test_a_member_past_the_bound_is_an_error_at_the_cut() -> None:
    rule = StalenessBound(2)
    assert rule.check(step=5, min_version=2, group_id=7) == 2
    with pytest.raises(StalenessError, match="group 7 has staleness 3 in batch 5, the bound is 2"):
        rule.check(step=5, min_version=1, group_id=7)


def two_batches_with_one_group_left(scenario: Scenario) -> list[core.Action]:
    """Prompts 0 and 1 are cut into batches 1 and 2 while prompt 2 runs, started with version 0."""
    scenario.join(credits=2)
    scenario.tell(core.BatchWanted(step=1))
    scenario.finish(0)
    scenario.train(1)
    scenario.tell(core.Ready(worker=0, credits=1))
    scenario.tell(core.SamplingBegan(lease_id=scenario.lease_of(2), version=0))
    scenario.finish(1)
    assert scenario.running == [2]
    return scenario.tell(core.BatchWanted(step=2))


def test_a_running_group_that_would_miss_the_next_batch_is_withdrawn_and_its_prompt_expires() -> None:
    scenario = tight("drop")
    actions = two_batches_with_one_group_left(scenario)
    ends = [action for action in actions if isinstance(action, core.EndLease)]
    assert [(end.prompt_id, end.outcome, end.reason) for end in ends] == [(2, "withdrawn", "stale")]
    assert scenario.state_of(2) == "expired"
    assert scenario.tell(group_done(ends[0].lease_id))[0].outcome == "late"


def test_a_lease_that_has_not_started_counts_with_the_version_its_worker_has_loaded() -> None:
    scenario = tight("drop")
    scenario.join(credits=2)
    scenario.tell(core.BatchWanted(step=1))
    scenario.finish(0)
    scenario.train(1)
    scenario.finish(1)
    scenario.tell(core.Ready(worker=0, credits=1), core.WeightsLoaded(worker=0, version=1))
    scenario.tell(core.BatchWanted(step=2))
    assert scenario.running == [2], "granted before the worker loaded version 1, started after"


def test_a_queued_group_past_the_bound_expires_right_after_the_cut() -> None:
    scenario = tight("drop")
    scenario.join(credits=2)
    scenario.finish(0, 1)
    scenario.tell(core.BatchWanted(step=1))
    scenario.train(1)
    scenario.tell(core.Ready(worker=0, credits=1))
    scenario.finish(2)
    assert scenario.state_of(2) == "queued"
    scenario.tell(core.BatchWanted(step=2))
    assert scenario.batches == [[0], [1]]
    assert scenario.reasons(2)[-1] == ("expired", "stale")


def test_the_oldest_groups_are_trained_on_first() -> None:
    scenario = Scenario(ReplayConfig(prompts_per_step=1, run_ahead=2, max_staleness=2))
    scenario.join(0, credits=3)
    scenario.tell(core.BatchWanted(step=1))
    scenario.finish(0)
    scenario.train(1)
    scenario.join(1, version=1, credits=1)
    scenario.finish(3, version=1)
    scenario.finish(2, version=0)
    scenario.finish(1, version=0)
    for step in (2, 3):
        scenario.tell(core.BatchWanted(step=step))
        scenario.train(step)
    assert scenario.batches == [[0], [1], [2]]


def test_requeue_puts_the_prompt_at_the_head_of_the_stream() -> None:
    scenario = tight("requeue")
    two_batches_with_one_group_left(scenario)
    assert scenario.reasons(2) == [("leased", ""), ("waiting", "stale")]
    scenario.train(2)
    scenario.tell(core.WeightsLoaded(worker=0, version=2), core.Ready(worker=0, credits=2))
    assert scenario.running == [2, 3]


def test_requeue_ends_failed_when_the_attempts_are_used_up() -> None:
    scenario = tight("requeue", max_attempts=1)
    two_batches_with_one_group_left(scenario)
    assert scenario.state_of(2) == "failed"


def test_wait_holds_the_cut_until_the_running_group_is_there() -> None:
    scenario = tight("wait")
    two_batches_with_one_group_left(scenario)
    assert scenario.batches == [[0]]
    assert why_waiting(scenario.state) == "rollout: 1 running, 1 of 1 ready"
    scenario.finish(2)
    assert scenario.batches == [[0], [1]]
    assert scenario.state_of(2) == "expired", "both can't be in batch 2, and batch 3 is too late for version 0"


def test_wait_ends_with_a_lost_lease() -> None:
    scenario = tight("wait")
    two_batches_with_one_group_left(scenario)
    scenario.tell(core.LeaseLost(lease_id=scenario.lease_of(2), reason="stalled"))
    assert scenario.batches == [[0], [1]]
    assert scenario.reasons(2)[-1] == ("waiting", "stalled")


def test_a_cut_that_is_held_back_is_not_held_longer_by_leases_to_old_weights() -> None:
    scenario = tight("wait", size=2)
    scenario.join(credits=4)
    scenario.tell(core.BatchWanted(step=1))
    scenario.finish(0, 1)
    scenario.train(1)
    scenario.finish(2, 3)
    scenario.tell(core.Ready(worker=0, credits=1), core.BatchWanted(step=2))
    scenario.join(1, version=0, credits=9)
    assert scenario.running == [4]
    scenario.finish(4, verdict="constant")
    assert scenario.batches == [[0, 1], [2, 3]]


def test_a_worker_whose_weights_miss_the_next_batch_gets_no_lease_until_it_has_loaded_newer_ones() -> None:
    scenario = tight("drop")
    two_batches_with_one_group_left(scenario)
    scenario.train(2)
    scenario.tell(core.BatchWanted(step=3), core.Ready(worker=0, credits=2))
    assert scenario.running == []
    assert why_waiting(scenario.state) == ("weights: no worker has loaded version 1, the oldest that fits batch 3")
    scenario.tell(core.WeightsLoaded(worker=0, version=2))
    assert scenario.running == [3, 4]


def test_while_one_worker_has_fresh_weights_the_wait_is_for_its_slots_and_not_for_weights() -> None:
    scenario = tight("drop")
    two_batches_with_one_group_left(scenario)
    scenario.train(2)
    scenario.join(1, version=2, credits=0)
    scenario.tell(core.BatchWanted(step=3))
    assert why_waiting(scenario.state) == "rollout: no free slot, 0 of 1 ready"


def test_a_group_with_a_token_older_than_its_lease_let_on_expires_on_arrival() -> None:
    scenario = tight("drop")
    two_batches_with_one_group_left(scenario)
    scenario.train(2)
    scenario.tell(core.WeightsLoaded(worker=0, version=2), core.Ready(worker=0, credits=1))
    scenario.finish(3, version=0)
    assert scenario.reasons(3)[-1] == ("expired", "stale")


def test_spares_end_with_their_step_so_none_grows_stale() -> None:
    fill = FilterConfig(max_gen_batches=4, on_limit="unfiltered")
    scenario = Scenario(ReplayConfig(prompts_per_step=2, run_ahead=1, max_staleness=1), fill)
    scenario.join(credits=4)
    scenario.tell(core.BatchWanted(step=1))
    scenario.finish(0, verdict="constant")
    assert scenario.state_of(0) == "spare"
    scenario.finish(1, 2)
    assert scenario.batches == [[1, 2]]
    assert scenario.reasons(0)[-1] == ("filtered", "constant")
