"""Checkpoints beside the train loop: what is said of one that is being written, and how long a run that was asked to
stop waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from asyncdapo.config.config import config_from_dict
from asyncdapo.controller.checks.resume import Resume
from asyncdapo.controller.loop.checkpointing import Checkpointing
from asyncdapo.controller.loop.run import Controller
from tests.controller.fakes import Pick, picked

SAID = "the checkpoint of step 4 (2.0 MiB) to be written"


class Fleet:
    """Two ranks of a learner, which write once they may, and a replay server."""

    def __init__(self, run_dir: Path) -> None:
        self.config = SimpleNamespace(run=SimpleNamespace(dir=str(run_dir)))
        self.publishing = SimpleNamespace(branch=0)
        self.learners = self.first = self
        self.replay = self
        self.may_write = asyncio.Event()

    async def call_all(self, pick: Pick, *args: Any) -> None:
        assert picked("learner", pick, *args) == "check_ranks"

    async def call_each(self, pick: Pick, *args: Any) -> list[Any]:
        if picked("learner", pick, *args) == "copy_checkpoint":
            return [1 << 20, 1 << 20]
        await self.may_write.wait()
        return [[], []]

    async def call(self, pick: Pick, *args: Any) -> None:
        assert picked("learner", pick, *args) == "commit_checkpoint"

    async def ask(self, pick: Pick, *args: Any) -> None:
        assert picked("replay", pick, *args) == "covered"


class Stalls:
    async def wait(self, work: Awaitable[Any], **_: Any) -> Any:
        return await work


class Notes(list[str]):
    """Those of a reporter."""

    def note(self, text: str) -> None:
        self.append(text)


async def begun(run_dir: Path) -> tuple[Checkpointing, Fleet]:
    """A checkpoint of step 4 is copied and being written."""
    fleet = Fleet(run_dir)
    checkpoints = Checkpointing(cast(Any, fleet), cast(Any, Stalls()), step=0)
    await checkpoints.begin(4, {})
    return checkpoints, fleet


def controller_of(run_dir: Path, stop_s: float) -> tuple[Controller, Notes]:
    notes = Notes()
    config = config_from_dict({"model": {"path": "none"}, "run": {"dir": str(run_dir), "stop_s": stop_s}})
    return Controller(config, Resume(new=True), cast(Any, notes), 0.0), notes


def test_what_is_being_written_is_named_with_its_size_and_nothing_once_it_is_whole(tmp_path: Path) -> None:
    async def main() -> None:
        (checkpoints, fleet), said = await begun(tmp_path), []
        waiting = asyncio.ensure_future(checkpoints.written(said.append))
        await asyncio.sleep(0)
        assert said == [SAID]
        assert not waiting.done()
        fleet.may_write.set()
        await waiting
        await checkpoints.written(said.append)
        assert said == [SAID]
        assert set(checkpoints.take()) == {"learner/checkpoint_copy_s", "learner/checkpoint_write_s"}

    asyncio.run(main())


def test_a_run_that_was_asked_to_stop_counts_its_time_anew_from_the_end_of_the_copy(tmp_path: Path) -> None:
    async def main() -> None:
        controller, notes = controller_of(tmp_path, stop_s=20)
        controller._handle_signal(asyncio.current_task())
        asked = controller._ends
        checkpoints, fleet = await begun(tmp_path)
        await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(checkpoints.written(controller._wait_for))
        await asyncio.sleep(0)
        assert notes[-1] == f"waits for {SAID}, within 20 s; once more ends the run at once"
        assert asked.cancelled()
        assert controller._ends.when() > asked.when()
        fleet.may_write.set()
        await waiting

    asyncio.run(main())


def test_writing_that_takes_longer_than_that_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        controller, _ = controller_of(tmp_path, stop_s=0.01)
        checkpoints, _ = await begun(tmp_path)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.ensure_future(checkpoints.written(controller._wait_for))

    asyncio.run(main())
