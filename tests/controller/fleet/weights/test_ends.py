"""Workers that say nothing in the middle of a transfer: what it costs the others, and what becomes of them."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from asyncdapo.controller.fleet.weights import ends
from asyncdapo.controller.fleet.weights.publishing import Publishing
from asyncdapo.controller.process.waits import Waits
from asyncdapo.errors import WeightsError
from asyncdapo.weights.config import WeightsConfig
from tests.controller.fakes import Pick, picked
from tests.controller.fleet.weights.test_publishing import FakeProcess, connected


class Stoppable(FakeProcess):
    """While it is stopped it answers nothing, and what it was asked before fails when it runs again."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs = asyncio.Event()
        self.runs.set()

    async def call(self, pick: Pick, *args: Any) -> Any:
        stopped = not self.runs.is_set()
        await self.runs.wait()
        if stopped and picked(self.name, pick, *args) == "receive_weights":
            raise WeightsError(f"{self.name} has no group any more")
        if picked(self.name, pick, *args) == "hears":
            return True
        return await super().call(pick, *args)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "ASK_S", 0.001)
    monkeypatch.setattr(ends, "SILENT_S", 0.02)


def published(*workers: FakeProcess) -> Publishing:
    """Version 4, and from now on it is known how long that takes."""
    made = connected(FakeProcess("learner"), [*workers], max_missed=1)
    asyncio.run(made.publish())
    made.learner_has(5, 0)
    return made


def test_the_others_get_a_version_without_a_stopped_worker_which_has_it_when_it_runs_again() -> None:
    stopped, other = Stoppable("rollout-0"), FakeProcess("rollout-1")
    made = published(stopped, other)

    async def scene() -> None:
        keeping = asyncio.ensure_future(made.keep_current(stopped))
        stopped.runs.clear()
        await asyncio.wait_for(made.publish(), 5)
        assert other.received()[-1] == (5, 0)
        assert stopped.received() == [(4, 0)]
        made.learner_has(6, 0)
        await asyncio.wait_for(made.publish(), 5)
        assert other.received()[-1] == (6, 0), "while it is silent nobody asks it again"
        stopped.runs.set()
        async with asyncio.timeout(5):
            while stopped.received()[-1] != (6, 0, "rollout-1"):
                await asyncio.sleep(0.001)
        keeping.cancel()

    asyncio.run(scene())
    assert stopped.up.is_set(), "it was not killed"


def test_a_worker_that_is_stopped_from_the_start_holds_up_neither_the_group_nor_the_first_version() -> None:
    stopped, other = Stoppable("rollout-0"), FakeProcess("rollout-1")
    stopped.runs.clear()
    made = Publishing(WeightsConfig(timeout_s=2.0), Waits("controller"), FakeProcess("learner"), [stopped, other])

    async def scene() -> None:
        async with asyncio.timeout(5):
            await made.begin()
            made.learner_has(1, 0)
            await made.publish()
        assert other.received() == [(1, 0)]
        keeping = asyncio.ensure_future(made.keep_current(stopped))
        stopped.runs.set()
        async with asyncio.timeout(5):
            while stopped.received() != [(1, 0, "rollout-1")]:
                await asyncio.sleep(0.001)
        keeping.cancel()

    asyncio.run(scene())


def test_an_answer_that_nobody_waits_for_any_more_leaves_no_error_behind(caplog: pytest.LogCaptureFixture) -> None:
    dying = FakeProcess("rollout-0", dies=lambda command, nth: command == "receive_weights")
    made = connected(FakeProcess("learner"), [dying])

    async def scene() -> None:
        publishing = asyncio.ensure_future(made.publish())
        while dying.up.is_set():
            await asyncio.sleep(0)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)

    asyncio.run(scene())
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_transfer_that_takes_as_long_as_ever_leaves_nobody_out() -> None:
    """The worker is busy for longer than `SILENT_S`, as in the transfer before."""

    class Busy(Stoppable):
        async def call(self, pick: Pick, *args: Any) -> Any:
            if picked(self.name, pick, *args) == "receive_weights":
                self.runs.clear()
                asyncio.get_running_loop().call_later(0.1, self.runs.set)
                await asyncio.sleep(0.1)
            return await super().call(pick, *args)

    worker = Busy("rollout-0")
    made = connected(FakeProcess("learner"), [worker], max_missed=1)

    async def scene() -> None:
        for version in (4, 5):
            made.learner_has(version, 0)
            await made.publish()

    asyncio.run(scene())
    assert worker.received() == [(4, 0), (5, 0)]


def test_a_stopped_newcomer_does_not_hold_up_the_next_one() -> None:
    made = published(FakeProcess("rollout-0"), stopped := Stoppable("rollout-1"), newcomer := FakeProcess("rollout-2"))
    asyncio.run(made.publish())
    for worker in (stopped, newcomer):
        worker.live_again()

    async def scene() -> None:
        stopped.runs.clear()
        first = asyncio.ensure_future(made.catch_up(stopped))
        await asyncio.sleep(0)
        await asyncio.wait_for(made.catch_up(newcomer), 5)
        assert newcomer.received()[-1] == (5, 0, "rollout-0")
        assert not first.done()
        stopped.runs.set()
        await asyncio.wait_for(first, 5)
        assert stopped.received()[-1] == (5, 0, "rollout-0")

    asyncio.run(scene())
