"""The ranks of the learner as the controller sees them: which of their answers and failures count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from asyncdapo.controller.fleet import ranks as learners_module
from asyncdapo.controller.fleet.process import ProcessDied
from asyncdapo.controller.fleet.ranks import LearnerRanks, together
from asyncdapo.errors import RanksError, RunError
from tests.controller.fakes import Pick, picked

GPUS = ["cuda A", "cuda B"]


class FakeRank:
    """A process that answers every command with its name, or as told."""

    def __init__(self, name: str, device: str = "cpu", answer: Callable[[str], Any] | None = None) -> None:
        self.name, self.device, self.answer, self.calls, self.lives = name, device, answer, [], True

    async def call(self, pick: Pick, *args: Any) -> Any:
        command = picked(self.name, pick, *args)
        self.calls.append((command, *args))
        if self.answer:
            return await self.answer(command)
        return {"device": self.device, "host_ranks": "127.0.0.1:1"}.get(command, self.name)

    def end(self) -> None:
        self.lives = False


async def hang() -> None:
    await asyncio.Event().wait()


async def fail(error: Exception, after_s: float = 0.0) -> None:
    await asyncio.sleep(after_s)
    raise error


def team(*devices: str) -> LearnerRanks:
    names = ["learner", *(f"learner-{rank}" for rank in range(1, len(devices)))]
    return LearnerRanks([FakeRank(name, device) for name, device in zip(names, devices, strict=True)])


def test_a_command_for_all_reaches_every_rank_and_the_first_answers() -> None:
    three = team("cpu", "cpu", "cpu")
    assert asyncio.run(three.call_all(lambda learner: learner.take_batch, 5)) == "learner"
    assert [rank.calls for rank in three.ranks] == [[("take_batch", 5)]] * 3


@pytest.mark.parametrize(("devices", "backend"), [(["cpu", "cpu"], "gloo"), (GPUS, "nccl"), (["cuda A"] * 2, "gloo")])
def test_the_ranks_join_where_the_first_one_hosts_before_they_load(devices: list[str], backend: str) -> None:
    two = team(*devices)
    asyncio.run(two.load(None))
    join, load = ("join_ranks", "127.0.0.1:1", backend), ("load", None)
    assert two.ranks[0].calls[1:] == [("host_ranks", backend), join, load]
    assert two.ranks[1].calls[1:] == [join, load]


def test_one_rank_needs_no_group() -> None:
    alone = team("cpu")
    asyncio.run(alone.load(None))
    assert alone.ranks[0].calls == [("load", None)]


def test_the_failure_of_one_ends_the_wait_for_those_that_wait_for_it() -> None:
    with pytest.raises(RunError, match="too many bad updates"):
        asyncio.run(asyncio.wait_for(together(hang(), fail(RunError("too many bad updates"))), 20))


def test_a_death_is_the_cause_though_the_others_notice_it_first() -> None:
    lost, death = RanksError("connection closed"), ProcessDied("learner-1", "killed")
    with pytest.raises(ProcessDied, match="learner-1"):
        asyncio.run(asyncio.wait_for(together(fail(lost), fail(death, after_s=0.1), fail(lost)), 20))


def test_what_a_rank_raises_on_purpose_is_the_cause_though_the_others_lose_it() -> None:
    raised = RunError("the disk is full")
    with pytest.raises(RunError, match="the disk is full"):
        asyncio.run(asyncio.wait_for(together(fail(RanksError("no end")), fail(raised, after_s=0.1)), 20))


def test_ranks_that_lost_each_other_while_all_live_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners_module, "CAUSE_GRACE_S", 0.05)
    with pytest.raises(RanksError, match="no end"):
        asyncio.run(asyncio.wait_for(together(fail(RanksError("no end")), hang()), 20))


def test_the_death_of_any_rank_or_of_their_group_is_the_learners() -> None:
    two = team("cpu", "cpu")
    for error, is_end in [
        (ProcessDied("learner", "killed"), True),
        (ProcessDied("learner-1", "killed"), True),
        (RanksError("connection closed"), True),
        (ProcessDied("replay", "killed"), False),
        (RunError("too many bad updates"), False),
    ]:
        assert two.ended_by(error) is is_end
    two.end()
    assert not any(rank.lives for rank in two.ranks)
