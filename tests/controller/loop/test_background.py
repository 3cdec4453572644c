"""Work beside the train loop: when it begins, and in which step its metrics and its errors come out."""

from __future__ import annotations

import asyncio
import gc

import pytest

from asyncdapo.controller.loop.background import BackgroundWork
from asyncdapo.errors import RunError


async def done_at_once() -> dict[str, float]:
    return {"eval/accuracy": 0.5}


async def failing() -> dict[str, float]:
    raise RunError("it failed")


def test_metrics_come_out_once_in_the_step_in_which_the_work_ended():
    async def main() -> None:
        aside, may_end = BackgroundWork(every=2, last_step=10), asyncio.Event()

        async def work() -> dict[str, float]:
            await may_end.wait()
            return await done_at_once()

        assert aside.after(2, work) == {}
        assert aside.after(3, work) == {}
        assert aside.take() == {}
        may_end.set()
        await aside.task
        assert aside.after(5, work) == {"eval/accuracy": 0.5}
        assert aside.after(5, work) == {}

    asyncio.run(main())


@pytest.mark.parametrize(("every", "begun"), [(3, [3, 6]), (1, [1, 2, 3, 4, 5, 6, 7, 8]), (0, [])])
def test_work_begins_after_every_so_many_steps_but_not_after_the_last(every, begun):
    async def main() -> list[int]:
        aside, steps = BackgroundWork(every, last_step=9), []
        for step in range(1, 10):
            aside.after(step, done_at_once)
            if aside.task:
                steps.append(step)
                await aside.task
        return steps

    assert asyncio.run(main()) == begun


def test_work_that_is_due_while_other_work_runs_is_left_out():
    async def main() -> None:
        aside = BackgroundWork(every=1, last_step=9)
        aside.begin(asyncio.Event().wait)
        before = aside.task
        aside.after(1, done_at_once)
        assert aside.task is before
        await aside.cancel()

    asyncio.run(main())


@pytest.mark.parametrize(
    "look", [BackgroundWork.check, BackgroundWork.take, lambda aside: aside.after(1, done_at_once)]
)
def test_an_error_is_raised_where_the_loop_looks(look):
    async def main() -> None:
        aside = BackgroundWork(every=0, last_step=9)
        aside.begin(failing)
        aside.check()  # not yet
        await asyncio.wait([aside.task])
        with pytest.raises(RunError, match="it failed"):
            look(aside)

    asyncio.run(main())


@pytest.mark.parametrize("work", [asyncio.Event().wait, done_at_once, failing], ids=["running", "done", "failed"])
def test_cancelled_work_is_forgotten_with_its_error(work):
    complaints = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
        aside = BackgroundWork(every=0, last_step=9)
        aside.begin(work)
        await asyncio.wait([aside.task], timeout=0)
        await aside.cancel()
        aside.check()
        assert aside.take() == {}
        await asyncio.sleep(0)
        gc.collect()

    asyncio.run(main())
    assert complaints == []


def test_cancelled_work_is_over_with_what_it_leaves_behind_before_other_work_may_begin():
    async def main() -> None:
        aside, left = BackgroundWork(every=0, last_step=9), ["answers"]

        async def work() -> dict[str, float]:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                left.clear()
            return {}

        aside.begin(work)
        await asyncio.sleep(0)
        await aside.cancel()
        assert left == []

    asyncio.run(main())
