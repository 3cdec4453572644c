"""The learner asks for batch k + 1 while it trains batch k: when that is cut, what it changes, and what never."""

from __future__ import annotations

import pytest

from asyncdapo.replay.config import ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.waits import gauges
from asyncdapo.shares import CutWanted
from tests.replay.scenario import Scenario
from tests.replay.small_run import SmallRun


def early(*, max_staleness: int, on_stale: str = "drop") -> Scenario:
    """Batch 1 is trained; of the groups 1 and 2, both of version 0, the first is ready and the other runs."""
    config = ReplayConfig(prompts_per_step=1, run_ahead=1, max_staleness=max_staleness, on_stale=on_stale)
    scenario = Scenario(config)
    scenario.join(credits=4)
    scenario.finish(0, verdict="constant")  # a lower keep rate lets one more run
    scenario.finish(1, verdict="constant")
    scenario.tell(core.Ready(worker=0, credits=4), core.BatchWanted(step=1))
    first, ready, slow = scenario.running[:3]
    for prompt_id in (first, ready, slow):
        scenario.tell(core.SamplingBegan(lease_id=scenario.lease_of(prompt_id), version=0))
    scenario.finish(first)
    scenario.finish(ready)
    assert scenario.batches == [[first]]
    assert scenario.running == [slow]
    return scenario


def test_an_early_batch_is_cut_at_once_when_nothing_ends_by_it() -> None:
    scenario = early(max_staleness=2)
    [slow] = scenario.running
    scenario.tell(core.BatchWanted(step=2))
    assert len(scenario.batches) == 2
    assert scenario.running == [slow]
    assert gauges(scenario.state)["in_training"] == 2
    scenario.train(1)
    assert gauges(scenario.state)["in_training"] == 1


@pytest.mark.parametrize("on_stale", ["auto", "drop", "requeue", "wait"])
def test_an_early_cut_waits_for_what_it_would_end(on_stale: str) -> None:
    scenario = early(max_staleness=1, on_stale=on_stale)
    [slow] = scenario.running
    scenario.tell(core.BatchWanted(step=2))
    assert len(scenario.batches) == 1
    assert scenario.running == [slow]
    scenario.finish(slow)
    assert len(scenario.batches) == 2


def test_an_early_cut_waits_no_longer_than_until_the_version_before_is_published() -> None:
    scenario = early(max_staleness=1)
    [slow] = scenario.running
    scenario.tell(core.BatchWanted(step=2), core.Trained(step=1))
    assert len(scenario.batches) == 1
    scenario.tell(core.Published(version=1))
    assert len(scenario.batches) == 2
    assert scenario.reasons(slow)[-1] == ("expired", "stale")


def test_a_cut_that_nobody_wants_early_is_made_as_it_was() -> None:
    """The rule of the early cut is about early ones only."""
    scenario = early(max_staleness=1)
    [slow] = scenario.running
    scenario.train(1)
    scenario.tell(core.BatchWanted(step=2))
    assert len(scenario.batches) == 2
    assert scenario.reasons(slow)[-1] == ("expired", "stale")


def test_an_early_cut_admits_as_much_as_the_queue_did() -> None:
    """What was queued is in training then: the left side of the rule stays what it was."""
    cut, waiting = early(max_staleness=2), early(max_staleness=2)
    cut.tell(core.BatchWanted(step=2))
    for scenario in (cut, waiting):
        scenario.tell(core.Ready(worker=0, credits=4))
    assert cut.running == waiting.running


def test_a_batch_that_was_sent_early_is_the_same_in_the_branch_after_a_rollback(tmp_path) -> None:
    run = SmallRun(tmp_path, max_staleness=2, run_ahead=2)
    run.join(0)
    run.fill(0)
    run.dispatch.want_batch(b"learner", CutWanted(step=1))
    [first] = run.answers()
    run.fill(0)
    run.dispatch.want_batch(b"learner", CutWanted(step=2))
    [second] = run.answers()
    assert (first.step, second.step, second.branch) == (1, 2, 0)
    run.dispatch.trained(1, {})
    run.dispatch.roll_back(1, "the learner died")
    run.dispatch.want_batch(b"its next life", CutWanted(step=2))
    [again] = run.answers()
    assert again.branch == 1, "what the dead one had is of another branch"
    assert [group.lease_id for group in again.groups] == [group.lease_id for group in second.groups]
