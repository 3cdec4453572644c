"""Publishing: who sends a newcomer the version in force, and what a publish means to it."""

from __future__ import annotations

import asyncio
from typing import Any

from asyncdapo.controller.fleet.weights.publishing import Publishing
from asyncdapo.errors import EngineError, WeightsError
from tests.controller.fakes import Pick, picked
from tests.controller.fleet.weights.test_publishing import FakeProcess, connected


def published_with_a_newcomer(*workers: FakeProcess) -> tuple[Publishing, FakeProcess]:
    """Every worker has version 4; then the last one lives again."""
    made = connected(FakeProcess("learner"), [*workers])
    asyncio.run(made.publish())
    workers[-1].live_again()
    return made, workers[-1]


def test_a_newcomer_is_sent_the_version_in_force_by_another_worker_while_the_learner_trains() -> None:
    made, newcomer = published_with_a_newcomer(FakeProcess("rollout-0"), FakeProcess("rollout-1"))

    async def train_meanwhile() -> None:
        async with made.turn:
            await asyncio.wait_for(made.catch_up(newcomer), 5)

    asyncio.run(train_meanwhile())
    assert newcomer.received()[1:] == [(4, 0, "rollout-0")]


def test_the_learner_sends_to_a_newcomer_when_the_other_worker_can_not() -> None:
    other = FakeProcess("rollout-0", fails=lambda command, nth: command == "send_weights")
    made, newcomer = published_with_a_newcomer(other, FakeProcess("rollout-1"))
    asyncio.run(made.catch_up(newcomer))
    assert newcomer.received()[1:] == [(4, 0, "rollout-0"), (4, 0)]


def test_workers_of_an_older_version_send_it_to_nobody() -> None:
    made, newcomer = published_with_a_newcomer(FakeProcess("rollout-0"), FakeProcess("rollout-1"))
    made.learner_has(5, 0)
    asyncio.run(made.catch_up(newcomer))
    assert newcomer.received()[1:] == [(5, 0)]


class Waiting(FakeProcess):
    """It receives from another worker until that one has left the group, or is gone."""

    async def call(self, pick: Pick, *args: Any) -> Any:
        answer = await super().call(pick, *args)
        if self.calls[-1] == ("receive_weights", 4, 0, "rollout-0"):
            await asyncio.sleep(0.01)
            raise WeightsError("rollout-0 is gone")
        return answer


def test_the_learner_sends_to_a_newcomer_when_the_other_worker_s_engine_ends_meanwhile() -> None:
    other = FakeProcess("rollout-0")
    made, newcomer = published_with_a_newcomer(other, Waiting("rollout-1"))
    answer = other.call

    async def engine_is_gone(pick: Pick, *args: Any) -> Any:
        if picked("rollout-0", pick, *args) in ("send_weights", "abandon_workers"):
            raise EngineError("rollout-0: the engine failed: its process ended")
        return await answer(pick, *args)

    other.call = engine_is_gone
    asyncio.run(made.catch_up(newcomer))
    assert newcomer.received()[1:] == [(4, 0, "rollout-0"), (4, 0)]
    assert not other.up.is_set()


class Slow(FakeProcess):
    """It sends to a newcomer until it receives something itself, as a worker's buffer does."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.sending, self.interrupted = asyncio.Event(), asyncio.Event()

    async def call(self, pick: Pick, *args: Any) -> Any:
        answer = await super().call(pick, *args)
        if self.calls[-1][0] == "make_weights_room":
            self.interrupted.set()
        if self.calls[-1][0] == "send_weights":
            self.sending.set()
            await self.interrupted.wait()
            raise WeightsError("rollout-0 has left the group")
        return answer


def test_a_publish_does_not_wait_for_a_newcomer_and_brings_it_the_new_version() -> None:
    other = Slow("rollout-0")
    made, newcomer = published_with_a_newcomer(other, FakeProcess("rollout-1"))
    other.interrupted.clear()

    async def publish_meanwhile() -> None:
        catching_up = asyncio.ensure_future(made.catch_up(newcomer))
        await other.sending.wait()
        made.learner_has(5, 0)
        await asyncio.wait_for(made.publish(), 5)
        await catching_up

    asyncio.run(publish_meanwhile())
    assert newcomer.received()[1:] == [(4, 0, "rollout-0"), (5, 0)]
