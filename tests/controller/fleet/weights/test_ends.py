"""Workers that say nothing in the middle of a transfer: what it costs the others, and what becomes of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncdapo.controller.fleet.weights import ends
from asyncdapo.controller.fleet.weights.publishing import Publishing
from asyncdapo.errors import WeightsError
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
    made = published(worker)
    asyncio.run(made.publish())
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
