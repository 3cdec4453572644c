"""What a worker's time goes into: one state at a time, and all of the time."""

from __future__ import annotations

import time

import pytest

from asyncdapo.accounting.names import WORKER_STATES
from asyncdapo.eval_messages import Sampling
from asyncdapo.messages import Lease
from asyncdapo.rollout.account import WorkerAccount
from asyncdapo.rollout.engine import Request
from asyncdapo.rollout.job import Job
from tests.replay.small_run import prompt_at
from tests.rollout.fakes import GROUP_SIZE, FakeEngine


def job(**state: int) -> Job:
    """One lease under way, all of whose sequences the engine has got."""
    lease = Lease(lease_id=1, branch=0, number=1, attempt=1, group_size=GROUP_SIZE, seed=0, prompt=prompt_at(0))
    made = Job(lease, 0, lambda: None)
    for name, number in state.items():
        setattr(made, name, number)
    return made


def state_of(account: WorkerAccount) -> str:
    """The state whose time goes on."""
    before = account.gauges()
    time.sleep(0.002)
    after = account.gauges()
    [state] = [state for state in WORKER_STATES if after[f"{state}_time_s"] > before[f"{state}_time_s"]]
    return state


@pytest.mark.parametrize(
    ("jobs", "num_outstanding", "num_unsent", "state"),
    [
        ([], 0, 0, "lease"),
        ([], 0, 1, "send"),
        ([job()], 0, 1, "score"),
        ([job(), job(num_in_environment=1)], 0, 0, "environment"),
        ([job(num_in_environment=1)], 2, 0, "generate"),
        ([job(num_starting=2)], 0, 0, "generate"),
        ([], 8, 0, "generate"),
    ],
)
def test_a_worker_is_in_the_first_state_that_holds(
    jobs: list[Job], num_outstanding: int, num_unsent: int, state: str
) -> None:
    engine = FakeEngine()
    account = WorkerAccount(engine)
    engine.num_outstanding = num_outstanding
    account.note(jobs, num_unsent)
    assert state_of(account) == state


@pytest.mark.parametrize(("stops", "state"), [(True, "load"), (False, "generate")])
def test_loading_counts_where_the_engine_stops_for_it(stops: bool, state: str) -> None:
    engine = FakeEngine()
    engine.stops_to_load, engine.num_outstanding = stops, 3
    account = WorkerAccount(engine)
    account.note([], 0)
    with account.loading():
        account.note([], 0)
        assert state_of(account) == state
    account.note([], 0)
    assert state_of(account) == "generate"


def test_the_states_of_a_worker_sum_to_its_wall_time() -> None:
    engine = FakeEngine()
    before = time.monotonic()
    account = WorkerAccount(engine)
    began = time.monotonic()
    for num_outstanding in (3, 12, 0):
        engine.num_outstanding = num_outstanding
        account.note([], 0)
        time.sleep(0.005)
    ended = time.monotonic()
    gauges = account.gauges()
    after = time.monotonic()
    assert ended - began <= sum(gauges[f"{state}_time_s"] for state in WORKER_STATES) <= after - before
    assert gauges["running_s"] > 8 * 0.005
    assert gauges["waiting_s"] >= 4 * 0.005


def test_tokens_that_the_server_was_not_told_of_are_late_when_their_lease_ends() -> None:
    account, ended = WorkerAccount(FakeEngine()), job()
    sampling = Sampling(temperature=1.0, max_tokens=20)
    request = ended.send(Request(prompt_ids=[1], seeds=[1], sampling=sampling))
    request.num_sampled = 7
    assert ended.tell().num_tokens == 7
    request.num_sampled = 10
    account.count_late(ended)
    assert account.gauges()["late_tokens"] == 3
