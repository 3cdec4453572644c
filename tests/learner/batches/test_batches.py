"""The next batch, brought while one is trained: against a real socket that plays the replay server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from asyncdapo.errors import BatchError, RunError
from asyncdapo.learner.batches.batches import Batches
from asyncdapo.learner.batches.feed import MAX_DAMAGED, BatchFeed
from asyncdapo.shares import Batch, CutWanted, NoBatch
from asyncdapo.transport.sockets import Server
from tests.asynchronous import TEST_TIMEOUT_S
from tests.learner.tiny import make_batch, stored


class Replay:
    """Answers a question as soon as its step is in `cut`."""

    def __init__(self) -> None:
        self.server = Server(CutWanted)
        self.questions: list[int] = []
        self.cut: dict[int, Batch | NoBatch] = {}
        self.asked = asyncio.Event()

    async def serve(self) -> None:
        while True:
            peer, message, _ = await self.server.receive()
            self.questions.append(message.step)
            self.asked.set()
            if message.step in self.cut:
                await self.server.send(peer, self.cut[message.step])


Stored = tuple[Path, dict[int, Batch]]


@pytest.fixture(scope="module")
def batches_of(tmp_path_factory) -> Stored:
    """A run directory and its first two batches, by step."""
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, {step: stored(run_dir, *make_batch(step)) for step in (1, 2)}


Story = Callable[[Replay, Batches], Awaitable[None]]


def play(story: Story, run_dir: Path = Path("nothing is read"), *, ask_again_s: float = 0.05) -> None:
    """The story of a replay server and one rank; `Prepared` is the batch's step as text."""

    async def prepare(batch, payload) -> str:
        return f"prepared {batch.step}"

    async def run() -> None:
        replay = Replay()
        batches = Batches(BatchFeed(replay.server.address, run_dir, ask_again_s=ask_again_s), prepare)
        serving = asyncio.create_task(replay.serve())
        try:
            async with asyncio.timeout(TEST_TIMEOUT_S):
                await story(replay, batches)
        finally:
            await batches.close()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            replay.server.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is left behind"

    asyncio.run(run())


def test_a_batch_that_was_asked_for_early_is_there_when_it_is_wanted(batches_of: Stored) -> None:
    run_dir, cut = batches_of

    async def story(replay: Replay, batches: Batches) -> None:
        replay.cut[2] = cut[2]
        batches.ask(2)
        while batches._coming[1].done() is False:
            await asyncio.sleep(0)
        num_questions = len(replay.questions)
        replay.cut.clear()  # nothing is answered any more
        assert await (await batches.receive(2)) == "prepared 2"
        assert replay.questions == [2] * num_questions

    play(story, run_dir)


def test_an_early_batch_is_shown_as_soon_as_it_is_ready_and_stays_until_it_is_wanted(batches_of: Stored) -> None:
    run_dir, cut = batches_of

    async def story(replay: Replay, batches: Batches) -> None:
        batches.ask(2)
        shown = asyncio.create_task(batches.ahead(2))
        await replay.asked.wait()
        assert not shown.done()
        replay.cut[2] = cut[2]
        assert await shown == "prepared 2"
        replay.cut.clear()
        assert await (await batches.receive(2)) == "prepared 2"

    play(story, run_dir)


@pytest.mark.parametrize("cause", ["the end of the data", "a file that is gone", "someone who stops to wait"])
def test_a_batch_that_does_not_come_is_not_shown_and_whoever_wants_it_hears_why(
    batches_of: Stored, tmp_path: Path, cause: str
) -> None:
    _, cut = batches_of

    async def story(replay: Replay, batches: Batches) -> None:
        batches.ask(2)
        shown = asyncio.create_task(batches.ahead(2))
        if cause == "someone who stops to wait":
            await replay.asked.wait()
            shown.cancel()
            await asyncio.gather(shown, return_exceptions=True)
        replay.cut[2] = NoBatch(step=2, reason="the data is used up") if cause == "the end of the data" else cut[2]
        assert shown.cancelled() or await shown is None
        wanted = await batches.receive(2)
        if isinstance(wanted, NoBatch):
            assert wanted.reason == "the data is used up"
        else:
            with pytest.raises(BatchError, match="No such"):
                await wanted

    play(story, tmp_path)


def test_an_early_batch_that_cannot_be_read_is_said_when_it_is_wanted(batches_of: Stored, tmp_path: Path) -> None:
    """By the task that reads it: the replay server has done its part."""
    _, cut = batches_of

    async def story(replay: Replay, batches: Batches) -> None:
        replay.cut[2] = cut[2]
        batches.ask(2)
        reading = await batches.receive(2)
        with pytest.raises(BatchError, match=r"batch 2 can't be read back from .*payloads/00000\d\.bin: No such"):
            await reading

    play(story, tmp_path)


def test_asking_twice_is_asking_once_and_another_step_is_refused() -> None:
    async def story(replay: Replay, batches: Batches) -> None:
        batches.ask(2)
        batches.ask(2)
        with pytest.raises(RunError, match="batch 3 was asked for, but batch 2 is not taken yet"):
            batches.ask(3)
        await replay.asked.wait()
        assert replay.questions == [2]

    play(story, ask_again_s=20)


def test_the_end_of_the_data_is_kept_for_whoever_wants_the_batch() -> None:
    async def story(replay: Replay, batches: Batches) -> None:
        replay.cut[2] = NoBatch(step=2, reason="the data is used up")
        batches.ask(2)
        for _ in range(2):
            assert await batches.receive(2) == NoBatch(step=2, reason="the data is used up")
        assert replay.questions == [2]

    play(story, ask_again_s=20)


def test_whoever_gives_up_waiting_gets_the_batch_when_he_comes_again(batches_of: Stored) -> None:
    run_dir, cut = batches_of

    async def story(replay: Replay, batches: Batches) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await batches.receive(1)
        replay.cut[1] = cut[1]
        assert await (await batches.receive(1)) == "prepared 1"

    play(story, run_dir)


def test_a_server_that_was_away_is_asked_again(batches_of: Stored) -> None:
    run_dir, cut = batches_of

    async def story(replay: Replay, batches: Batches) -> None:
        batches.ask(2)
        while len(replay.questions) < 3:
            await asyncio.sleep(0.01)
        replay.cut[2] = cut[2]
        assert await (await batches.receive(2)) == "prepared 2"

    play(story, run_dir)


def test_damage_of_an_early_batch_is_raised_where_the_batch_is_wanted(
    batches_of: Stored,
) -> None:
    run_dir, cut = batches_of

    async def story(replay: Replay, batches: Batches) -> None:
        replay.cut[2] = replace(cut[2], places=[])
        batches.ask(2)
        while len(replay.questions) < MAX_DAMAGED:
            await asyncio.sleep(0.01)
        with pytest.raises(RunError, match="batch 2 arrived damaged"):
            await batches.receive(2)

    play(story, run_dir)


def test_an_error_of_the_preparation_is_raised_where_the_batch_is_wanted(
    batches_of: Stored,
) -> None:
    run_dir, cut = batches_of

    async def run() -> None:
        replay = Replay()

        async def prepare(batch, payload) -> None:
            raise ValueError("no rows")

        batches = Batches(BatchFeed(replay.server.address, run_dir), prepare)
        serving = asyncio.create_task(replay.serve())
        replay.cut[1] = cut[1]
        try:
            with pytest.raises(ValueError, match="no rows"):
                await (await batches.receive(1))
        finally:
            serving.cancel()
            await batches.close()
            replay.server.close()

    asyncio.run(run())


@pytest.mark.parametrize("is_cut", [False, True])
def test_closing_gives_up_what_is_on_its_way_or_has_come(batches_of: Stored, is_cut: bool) -> None:
    run_dir, cut = batches_of

    async def story(replay: Replay, batches: Batches) -> None:
        if is_cut:
            replay.cut[2] = cut[2]
        batches.ask(2)
        await replay.asked.wait()
        while is_cut and not batches._coming[1].done():
            await asyncio.sleep(0)

    play(story, run_dir)
