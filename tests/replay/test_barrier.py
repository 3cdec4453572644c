"""`run_ahead: 0`: the same code is a barrier, with staleness 0 and batches that the order of arrival can't change.

The reference is a few lines: walk the stream in order, take the first B kept prompts, begin the next step right behind
the last of them (`mode: replace`: the first B prompts, if one of them is kept). A verdict depends on the prompt and the
weights, so a prompt that went back to the stream and was sampled again shows.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core import events as core
from asyncdapo.replay.core.batch import draw_copies
from asyncdapo.replay.core.waits import why_waiting
from tests.replay.scenario import Scenario, grants_of, group_done, moves_of, stop_of

NUM_STEPS = 6


def verdict_of(seed: int, prompt_id: int, version: int) -> str:
    return random.Random(f"{seed} {prompt_id} {version}").choice(["kept", "kept", "constant", "constant", "masked"])


def reference(seed: int, size: int, filter: FilterConfig) -> list[list[int]]:
    """Members of each batch, without leases, workers or time."""
    return (replaced if filter.replaces else filtered)(seed, size, filter)


def replaced(seed: int, size: int, filter: FilterConfig) -> list[list[int]]:
    batches, first = [], 0
    limit = filter.max_gen_batches * filter.gen_batch_multiplier * size
    for step in range(1, NUM_STEPS + 1):
        verdicts: dict[int, str] = {}
        while "kept" not in verdicts.values() and not (limit and len(verdicts) == limit):
            begin = first + len(verdicts)
            verdicts |= {p: verdict_of(seed, p, step - 1) for p in range(begin, begin + size)}
        members, first_after = [p for p in verdicts if verdicts[p] == "kept"], first + len(verdicts)
        if not members and filter.on_limit == "unfiltered":
            members = [p for p in verdicts if verdicts[p] == "constant"][:size]
            first_after = 1 + max(members, default=0)
        if not members:
            break
        batches.append(members)
        first = first_after
    return batches


def filtered(seed: int, size: int, filter: FilterConfig) -> list[list[int]]:
    batches, first = [], 0
    for step in range(1, NUM_STEPS + 1):
        kept, constant, prompt_id = [], [], first
        limit = filter.max_gen_batches * filter.gen_batch_multiplier * size
        while len(kept) < size and not (limit and prompt_id - first == limit):
            verdict = verdict_of(seed, prompt_id, step - 1)
            if verdict == "kept":
                kept.append(prompt_id)
            elif verdict == "constant":
                constant.append(prompt_id)
            prompt_id += 1
        if len(kept) < size and filter.on_limit == "unfiltered":
            kept += constant[: size - len(kept)]
        if not kept:
            break
        batches.append(sorted(kept))
        first = max(kept) + 1
    return batches


class ManyWorkers:
    """Runs some steps at the barrier with arrivals, deaths, stalls and loads in an order drawn from `schedule`."""

    def __init__(self, size: int, filter: FilterConfig, verdict_seed: int, schedule: random.Random) -> None:
        config = ReplayConfig(prompts_per_step=size, run_ahead=0, max_staleness=3)
        self.scenario = Scenario(config, filter, max_attempts=10_000)
        self.filter, self.verdict_seed, self.schedule = filter, verdict_seed, schedule
        self.num_slots = schedule.randint(1, 9)
        self.trained = 0
        for worker in range(schedule.randint(1, 4)):
            self.scenario.join(worker)

    def run(self) -> list[list[int]]:
        scenario = self.scenario
        while self.trained < NUM_STEPS and not scenario.truth.over:
            self._anything()
            if len(scenario.batches) > self.trained and self.schedule.random() < 0.2:
                self.trained += 1
                scenario.train(self.trained)
            else:
                early = self.schedule.random() < 0.5  # asked for while the batch before is trained
                scenario.tell(core.BatchWanted(step=len(scenario.batches) + 1 if early else self.trained + 1))
        return scenario.batches

    def _anything(self) -> None:
        scenario, loaded = self.scenario, self.scenario.truth.loaded
        worker = self.schedule.choice(list(loaded))
        what = self.schedule.random()
        if scenario.running and what < 0.4:
            prompt_id = self.schedule.choice(scenario.running)
            verdict = verdict_of(self.verdict_seed, prompt_id, self.trained)
            scenario.finish(prompt_id, verdict=verdict, version=self.trained)
        elif scenario.running and what < 0.43:
            scenario.tell(core.LeaseLost(lease_id=self.schedule.choice(list(scenario.truth.leases)), reason="stalled"))
        elif what < 0.46:
            scenario.tell(core.WorkerLost(worker=worker))
            scenario.join(worker, version=self.trained)
        elif what < 0.6 and loaded[worker] < self.trained:
            scenario.tell(core.WeightsLoaded(worker=worker, version=self.trained))
        else:
            held = sum(lease.worker == worker for lease in scenario.truth.leases.values())
            scenario.tell(core.Ready(worker=worker, credits=self.num_slots - held))


FILTERS = [
    FilterConfig(),
    FilterConfig(max_gen_batches=2, on_limit="partial"),
    FilterConfig(max_gen_batches=2, on_limit="unfiltered"),
    FilterConfig(max_gen_batches=1, gen_batch_multiplier=2, on_limit="unfiltered"),
    FilterConfig(mode="replace"),
    FilterConfig(mode="replace", max_gen_batches=2, on_limit="partial"),
    FilterConfig(mode="replace", max_gen_batches=1, gen_batch_multiplier=2, on_limit="unfiltered"),
]


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 5),
    filter=st.sampled_from(FILTERS),
    verdict_seed=st.integers(0, 10**6),
    schedule=st.randoms(use_true_random=False),
)
def test_membership_depends_neither_on_arrival_nor_on_the_workers(
    size: int, filter: FilterConfig, verdict_seed: int, schedule: random.Random
) -> None:
    workers = ManyWorkers(size, filter, verdict_seed, random.Random(schedule.random()))
    batches = workers.run()
    assert batches == reference(verdict_seed, size, filter)[: len(batches)]
    assert len(batches) == NUM_STEPS or stop_of(workers.scenario.actions).error
    cuts = [action for action in workers.scenario.actions if isinstance(action, core.CutBatch)]
    assert {age for cut in cuts for age in cut.staleness} <= {0}
    for cut in cuts:
        members = batches[cut.step - 1]
        replaced = filter.replaces and verdict_of(verdict_seed, members[0], cut.step - 1) == "kept"
        assert cut.copies == draw_copies(cut.step, members, size - len(members) if replaced else 0)
    limit = filter.max_gen_batches * filter.gen_batch_multiplier
    closed = [action for action in workers.scenario.actions if isinstance(action, core.GenBatchClosed)]
    assert not limit or all(action.number <= filter.max_gen_batches for action in closed)


def barrier(size: int = 2, **filter: object) -> Scenario:
    scenario = Scenario(ReplayConfig(prompts_per_step=size, run_ahead=0, max_staleness=5), FilterConfig(**filter))
    scenario.join(credits=99)
    scenario.tell(core.BatchWanted(step=1))
    return scenario


def test_the_bound_is_0_whatever_max_staleness_says() -> None:
    assert barrier().state.bound.max_staleness == 0


def test_the_cut_waits_until_nothing_runs() -> None:
    scenario = barrier()
    scenario.finish(0, verdict="constant")
    assert scenario.running == [1, 2, 3]
    scenario.finish(2, 3)
    assert scenario.batches == []
    scenario.finish(1)
    assert scenario.batches == [[1, 2]]


def test_what_lies_behind_the_last_member_goes_back_to_the_stream_and_costs_no_attempt() -> None:
    scenario = barrier()
    scenario.finish(0, 1, verdict="constant")
    assert scenario.running == [2, 3, 4]
    scenario.finish(4, 3, 2)
    assert scenario.batches == [[2, 3]]
    moves = [move for move in moves_of(scenario.actions) if move.prompt_id == 4]
    assert [move.state for move in moves] == ["leased", "queued", "waiting"]
    assert moves[-1].reason == "behind the last member"
    assert moves[-1].attempts == 0
    assert [scenario.state_of(prompt_id) for prompt_id in (0, 1)] == ["filtered", "filtered"]
    scenario.train(1)
    grants = grants_of(scenario.tell(core.WeightsLoaded(worker=0, version=1)))
    assert [(grant.prompt_id, grant.attempt) for grant in grants] == [(4, 1), (5, 1), (6, 1)]


@pytest.mark.parametrize("verdict", ["constant", "masked"])
def test_a_group_that_is_not_kept_goes_back_too_if_it_lies_behind_the_last_member(verdict: str) -> None:
    scenario = barrier()
    scenario.finish(0, 1, verdict="constant")
    scenario.finish(4, verdict=verdict)
    assert scenario.state_of(4) == "spare"
    scenario.finish(2, 3, *scenario.running[2:])
    assert scenario.batches == [[2, 3]]
    assert scenario.state_of(4) == "waiting"


def test_a_lost_prompt_before_the_last_member_holds_the_cut() -> None:
    scenario = barrier()
    scenario.finish(0, verdict="constant")
    scenario.tell(core.Ready(worker=0, credits=0))
    scenario.finish(2)
    lost = scenario.lease_of(1)
    scenario.tell(core.LeaseLost(lease_id=lost, reason="stalled"))
    assert scenario.batches == []
    scenario.tell(core.Ready(worker=0, credits=9))
    assert scenario.running == [1, 3]
    scenario.finish(3, 1)
    assert scenario.batches == [[1, 2]]


def test_nothing_is_leased_while_the_learner_trains() -> None:
    scenario = barrier()
    scenario.finish(0, 1)
    assert scenario.tell(core.Ready(worker=0, credits=99)) == []
    assert why_waiting(scenario.state) == "learner: trains step 1"
    assert scenario.tell(core.BatchWanted(step=2)) == []
    scenario.tell(core.Trained(step=1))
    assert why_waiting(scenario.state) == "weights: version 1 is trained and not published"
    scenario.tell(core.Published(version=1))
    assert scenario.running == []
    assert why_waiting(scenario.state).startswith("weights: no worker has loaded version 1")


def test_only_workers_that_have_loaded_the_current_version_get_leases() -> None:
    scenario = barrier()
    scenario.join(1, credits=99)
    scenario.finish(0, 1)
    scenario.tell(core.BatchWanted(step=2))
    scenario.train(1)
    scenario.tell(core.WeightsLoaded(worker=1, version=1))
    assert scenario.running == [2, 3]
    assert {lease.worker for lease in scenario.truth.leases.values()} == {1}


def test_with_a_limit_verdicts_and_running_groups_never_exceed_it() -> None:
    scenario = barrier(max_gen_batches=2, on_limit="unfiltered")
    scenario.finish(0, 1, verdict="constant")
    assert scenario.running == [2, 3], "the keep rate alone would admit three"
    scenario.finish(3, verdict="masked")
    scenario.finish(2)
    assert scenario.batches == [[0, 2]]
    assert scenario.state_of(1) == "filtered"
    assert scenario.state_of(3) == "waiting"


def test_at_the_limit_with_nothing_to_train_the_run_ends_with_its_cause() -> None:
    scenario = barrier(max_gen_batches=1, on_limit="partial")
    stop = stop_of(scenario.finish(0, 1, verdict="constant"))
    assert stop.error
    assert stop.reason.startswith(
        "filter.max_gen_batches: 1 generation batches gave 0 of the 2 groups that step 1 needs"
    )


def test_the_last_short_batch_gives_nothing_back() -> None:
    config = ReplayConfig(prompts_per_step=2, run_ahead=0, max_staleness=0)
    scenario = Scenario(config, FilterConfig(on_limit="partial"), num_prompts=3)
    scenario.join(credits=9)
    scenario.tell(core.BatchWanted(step=1))
    scenario.finish(0)
    scenario.finish(1, 2, verdict="constant")
    assert scenario.batches == [[0]]
    assert [scenario.state_of(prompt_id) for prompt_id in (1, 2)] == ["filtered", "filtered"]


def test_a_late_group_of_a_surplus_prompt_changes_nothing() -> None:
    scenario = barrier()
    scenario.finish(0, 1, verdict="constant")
    lease_id = scenario.lease_of(4)
    scenario.finish(4, 3, 2)
    assert scenario.state_of(4) == "waiting"
    assert [action.outcome for action in scenario.tell(group_done(lease_id))] == ["late"]
