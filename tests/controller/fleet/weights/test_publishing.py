"""Publishing: what the controller does when weights arrive, and when they don't."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from asyncdapo.controller.fleet.process import ProcessDied
from asyncdapo.controller.fleet.weights import ends as calls
from asyncdapo.controller.fleet.weights import publishing
from asyncdapo.controller.fleet.weights.publishing import Publishing
from asyncdapo.controller.process.waits import Waits
from asyncdapo.errors import ConfigError, EngineError, RunError, WeightsError
from asyncdapo.weights.config import WeightsConfig
from tests.controller.fakes import Pick, picked

Fails = Callable[[str, int], bool]


def never(command: str, nth: int) -> bool:
    return False


class FakeProcess:
    """A process that answers as told; `fails` and `dies` decide by command and how often it was called."""

    def __init__(self, name: str, *, fails: Fails = never, dies: Fails = never, **seconds: float) -> None:
        """`seconds` are what parts of a worker's transfer take."""
        self.name, self.fails, self.dies, self.calls = name, fails, dies, []
        self.seconds = dict.fromkeys(publishing.PARTS, 0.0) | seconds
        self.life, self.up = 1, asyncio.Event()
        self.up.set()

    async def call(self, pick: Pick, *args: Any) -> Any:
        command = picked(self.name, pick, *args)
        self.calls.append((command, *args))
        nth = sum(call[0] == command for call in self.calls)
        if self.dies(command, nth):
            self.up.clear()
            raise ProcessDied(self.name, "killed")
        if self.fails(command, nth):
            raise WeightsError(f"{self.name} lost the connection")
        answers = {
            "device": f"cuda {self.name} on x",
            "host_weights": ("127.0.0.1:1", "manifest"),
            "send_weights": {"seconds": 0.5, "gather_s": 0.2, "bytes": 100},
            "receive_weights": self.seconds,
        }
        return answers.get(command)

    def live_again(self) -> None:
        self.life += 1
        self.up.set()

    def end(self) -> None:
        self.up.clear()

    def commands(self) -> list[str]:
        return [call[0] for call in self.calls if call[0] not in ("abandon_workers", "leave_weights")]

    def received(self) -> list[tuple[int, int]]:
        """Versions and branches."""
        return [call[1:] for call in self.calls if call[0] == "receive_weights"]


def connected(learner: FakeProcess, workers: list[FakeProcess], *, version: int = 4, **config: Any) -> Publishing:
    made = Publishing(WeightsConfig(**config), Waits("controller"), learner, workers)
    asyncio.run(made.begin())
    made.learner_has(version, branch=0)
    return made


def test_every_worker_joins_with_a_rank_of_its_own() -> None:
    learner, workers = FakeProcess("learner"), [FakeProcess("rollout-0"), FakeProcess("rollout-1")]
    connected(learner, workers)
    assert learner.calls[1] == ("host_weights", 3, "nccl")
    joins = [worker.calls[-1] for worker in workers]
    assert joins == [("join_weights", "127.0.0.1:1", rank, 3, "nccl", "manifest") for rank in (1, 2)]


def test_an_end_that_can_not_use_the_backend_is_named() -> None:
    worker = FakeProcess("rollout-0")
    made = Publishing(WeightsConfig(backend="nccl"), Waits("controller"), FakeProcess("learner"), [worker])

    async def device_without_gpu(pick: Pick, *args: Any) -> Any:
        return "cpu on y" if picked("rollout-0", pick, *args) == "device" else None

    worker.call = device_without_gpu
    with pytest.raises(ConfigError, match="rollout-0 has no GPU"):
        asyncio.run(made.begin())


def test_a_publish_reports_bytes_and_the_slowest_of_each_part() -> None:
    made = connected(
        FakeProcess("learner"),
        [
            FakeProcess("rollout-0", receive_s=2.0, pause_s=0.25),
            FakeProcess("rollout-1", receive_s=1.0, load_s=3.0, resume_s=0.125),
        ],
    )
    metrics = asyncio.run(made.publish())
    assert metrics == {
        "weights/publish_s": 0.5,
        "weights/gather_s": 0.2,
        "weights/send_s": 0.3,
        "weights/bytes": 100,
        "weights/receive_s": 2.0,
        "weights/pause_s": 0.25,
        "weights/load_s": 3.0,
        "weights/resume_s": 0.125,
    }


def test_a_failed_transfer_is_sent_again_through_a_new_group() -> None:
    learner = FakeProcess("learner")
    worker = FakeProcess("rollout-0", fails=lambda command, nth: command == "receive_weights" and nth == 1)
    asyncio.run(connected(learner, [worker]).publish())
    assert worker.commands() == ["device", "make_weights_room", "join_weights", "receive_weights"] * 2
    assert [call for call in learner.calls if call[0] == "send_weights"] == [("send_weights", 4, 0)] * 2


def test_a_version_that_never_arrives_ends_the_run_after_max_missed() -> None:
    learner = FakeProcess("learner")
    worker = FakeProcess("rollout-0", fails=lambda command, nth: command == "receive_weights")
    with pytest.raises(RunError, match=r"version 4 did not arrive 2 times \(weights.max_missed\): rollout-0 lost"):
        asyncio.run(connected(learner, [worker], max_missed=2).publish())
    assert worker.commands().count("receive_weights") == 2


def test_the_others_get_a_version_under_which_one_worker_died_and_it_catches_up_in_its_next_life() -> None:
    learner, other = FakeProcess("learner"), FakeProcess("rollout-1")
    worker = FakeProcess("rollout-0", dies=lambda command, nth: command == "receive_weights" and nth == 1)
    made = connected(learner, [worker, other])
    asyncio.run(made.publish())
    assert other.received() == [(4, 0), (4, 0)]
    worker.live_again()
    asyncio.run(made.catch_up(worker))
    assert worker.received() == [(4, 0), (4, 0, "rollout-1")]
    assert other.received() == [(4, 0), (4, 0)], "a catch-up is sent to one alone"
    made.learner_has(5, 0)
    asyncio.run(made.publish())
    assert worker.received()[-1] == other.received()[-1] == (5, 0)


def test_a_worker_that_has_what_the_learner_has_is_sent_nothing() -> None:
    worker = FakeProcess("rollout-0")
    made = connected(FakeProcess("learner"), [worker])
    asyncio.run(made.publish())
    asyncio.run(made.catch_up(worker))
    assert worker.received() == [(4, 0)]


def test_a_new_worker_at_the_beginning_has_the_models_own_weights() -> None:
    worker = FakeProcess("rollout-0")
    made = connected(FakeProcess("learner"), [worker], version=0)
    worker.live_again()
    asyncio.run(made.catch_up(worker))
    assert worker.received() == []
    made.learner_has(0, branch=1)
    asyncio.run(made.catch_up(worker))
    assert worker.received() == [(0, 1)], "after a rollback to step 0 it has to learn of the branch"


def test_a_worker_that_misses_every_catch_up_is_killed() -> None:
    worker = FakeProcess("rollout-0", fails=lambda command, nth: command == "receive_weights")
    made = connected(FakeProcess("learner"), [worker], max_missed=2)
    asyncio.run(made.catch_up(worker))
    assert len(worker.received()) == 2
    assert not worker.up.is_set()


def test_the_learners_death_ends_a_publish_and_a_catch_up_is_left_to_the_next() -> None:
    learner = FakeProcess("learner", dies=lambda command, nth: command == "send_weights")
    worker = FakeProcess("rollout-0")
    made = connected(learner, [worker])
    with pytest.raises(ProcessDied, match="learner"):
        asyncio.run(made.publish())
    learner.live_again()
    asyncio.run(made.catch_up(worker))
    assert worker.up.is_set()


def test_with_no_worker_up_a_version_is_published_to_nobody() -> None:
    worker = FakeProcess("rollout-0")
    made = connected(FakeProcess("learner"), [worker])
    worker.end()
    assert asyncio.run(made.publish())["weights/bytes"] == 0


class Silent(FakeProcess):
    """It hangs in every transfer."""

    async def call(self, pick: Pick, *args: Any) -> Any:
        if picked(self.name, pick, *args) in ("receive_weights", "give_shards"):
            await asyncio.Event().wait()
        return await super().call(pick, *args)


def test_a_transfer_is_a_wait_for_each_end_that_has_not_answered_yet() -> None:
    waits = Waits("controller")
    ends = FakeProcess("learner"), [FakeProcess("rollout-0")], [Silent("learner-1")]
    made = Publishing(WeightsConfig(), waits, *ends)

    async def hang() -> list[tuple[str, str]]:
        publishing = asyncio.ensure_future(made.publish())
        while not ends[1][0].received():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        left = [(wait.whom, wait.what) for wait in waits.open()]
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        return left

    assert asyncio.run(hang()) == [("learner-1", "the transfer of version 0")]
    assert waits.open() == []


def test_an_end_that_never_answers_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "COMMAND_MARGIN_S", 0.05)
    silent, other = Silent("rollout-0"), FakeProcess("rollout-1")
    made = connected(FakeProcess("learner"), [silent, other], timeout_s=0.05)
    asyncio.run(made.publish())
    assert not silent.up.is_set()
    assert other.received() == [(4, 0), (4, 0)]


def test_a_send_waits_until_the_learner_has_trained_and_then_sends_what_is_new() -> None:
    worker = FakeProcess("rollout-0")
    made = connected(FakeProcess("learner"), [worker])

    async def train_meanwhile() -> None:
        async with made.turn:
            catching_up = asyncio.ensure_future(made.catch_up(worker))
            await asyncio.sleep(0.05)
            assert worker.received() == []
            made.learner_has(5, 0)
        await catching_up

    asyncio.run(train_meanwhile())
    assert worker.received() == [(5, 0)]


@pytest.mark.parametrize("command", ["receive_weights", "device", "make_weights_room", "join_weights"])
def test_a_worker_whose_engine_has_ended_is_ended_and_the_others_get_the_version(command: str) -> None:
    learner, workers = FakeProcess("learner"), [FakeProcess("rollout-0"), FakeProcess("rollout-1")]
    made = connected(learner, workers)
    if command != "receive_weights":
        workers[0].live_again()  # so that there is a new group to make
    answer = workers[0].call

    async def engine_is_gone(pick: Pick, *args: Any) -> Any:
        if picked("rollout-0", pick, *args) == command:
            raise EngineError("rollout-0: the engine failed: its process ended")
        return await answer(pick, *args)

    workers[0].call = engine_is_gone
    asyncio.run(made.publish())
    assert not workers[0].up.is_set()
    assert (4, 0) in workers[1].received()
