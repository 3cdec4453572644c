"""The watched set: whatever ends before the work does ends the run, with its own error."""

from __future__ import annotations

import asyncio

import pytest

from asyncdapo.controller.fleet import process as processes
from asyncdapo.controller.fleet.process import Watch
from asyncdapo.errors import RunError, StalenessError


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "CAUSE_GRACE_S", 0.2)


async def forever() -> None:
    await asyncio.Event().wait()


async def fail(error: Exception, after_s: float = 0.0) -> None:
    await asyncio.sleep(after_s)
    raise error


def guard(work, **watched):
    async def run():
        watch = Watch()
        for name, task in watched.items():
            watch.add(name, task)
        return await watch.guard(work)

    return asyncio.run(asyncio.wait_for(run(), 10))


def test_the_result_of_the_work_is_returned_while_everything_lives() -> None:
    async def work() -> int:
        await asyncio.sleep(0.01)
        return 7

    assert guard(work(), replay=forever(), learner=forever()) == 7


def test_a_watched_failure_cancels_the_work_and_is_raised() -> None:
    cancelled = []

    async def work() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(StalenessError, match="too old"):
        guard(work(), replay=forever(), learner=fail(StalenessError("too old")))
    assert cancelled == [True]


def test_a_clean_early_end_is_an_error_that_names_who_ended() -> None:
    with pytest.raises(RunError, match="rollout-0 ended before the run did"):
        guard(forever(), rollout=forever(), **{"rollout-0": asyncio.sleep(0)})


def test_a_death_that_shows_after_a_failed_call_is_the_cause() -> None:
    died = fail(RunError("learner: the process died"), after_s=0.05)
    with pytest.raises(RunError, match="the process died"):
        guard(fail(RunError("no answer")), learner=died)


def test_a_failure_of_the_work_itself_is_raised_when_everyone_lives() -> None:
    with pytest.raises(KeyError):
        guard(fail(KeyError("step")), replay=forever())


def test_nothing_watched_is_left_running() -> None:
    ended = []

    async def watched() -> None:
        try:
            await forever()
        finally:
            ended.append(True)

    guard(asyncio.sleep(0.01), replay=watched())
    assert ended == [True]
