"""The scorer pool with an async function: texts side by side, each under the time-out, and further tries."""

import asyncio
from pathlib import Path

import pytest

from asyncdapo.errors import RewardError
from asyncdapo.reward.wire import Verdict
from tests.asynchronous import asynchronous, until
from tests.reward.processes import running

QUIET = {"scorer_timeouts": 0, "scorer_restarts": 0}


def values(said):
    return [verdict.value for verdict in said]


@asynchronous
async def test_a_group_is_judged_side_by_side_in_one_process(tmp_path: Path) -> None:
    async with running("obey_async", concurrency=8) as pool:
        files = [tmp_path / str(number) for number in range(8)]
        asked = asyncio.create_task(pool.verify([f"wait {file}" for file in files], ""))
        await until(lambda: all(file.exists() for file in files))
        for file in files:
            file.unlink()
        assert values(await asked) == [0.0] * 8
        assert pool.gauges() == QUIET


@asynchronous
async def test_its_own_numbers_come_with_each_verdict() -> None:
    async with running("obey_async", concurrency=2) as pool:
        said = await pool.verify(["sleep 0.2", "6"], "6")
        assert said[0].metrics["at_s"] > said[1].metrics["at_s"] > 0


@asynchronous
async def test_one_text_over_the_time_counts_0_and_the_others_keep_their_verdicts() -> None:
    async with running("obey_async", timeout_s=1.5, concurrency=3) as pool:
        said = await pool.verify(["6", "sleep 0.1", "hang", "6", "7", "6"], "6")
        assert values(said) == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
        assert said[2] == Verdict(0.0, timed_out=True)
        assert not any(verdict.timed_out for verdict in said[:2] + said[3:])
        assert pool.gauges() == {"scorer_timeouts": 1, "scorer_restarts": 2}


@asynchronous
async def test_one_that_does_not_let_the_others_run_is_told_from_them() -> None:
    """It holds up the verdict of the text before it, which the second time is judged alone."""
    async with running("obey_async", timeout_s=1.0, concurrency=2) as pool:
        said = await pool.verify(["sleep 0.1", "block", "6"], "6")
        assert said[1] == Verdict(0.0, timed_out=True)
        assert (said[0].timed_out, said[2].value) == (False, 1.0)


@asynchronous
async def test_the_time_is_each_texts_however_many_are_under_way() -> None:
    """Together they take longer than one may."""
    async with running("obey_async", timeout_s=2.0, concurrency=2) as pool:
        assert values(await pool.verify(["sleep 0.6"] * 10, "")) == [0.0] * 10
        assert pool.gauges() == QUIET


@asynchronous
async def test_pauses_between_tries_are_not_held_against_a_text(tmp_path: Path) -> None:
    async with running("obey_async", timeout_s=0.4, retries=2) as pool:
        text = f"raise_once {tmp_path / 'tried'}"
        assert values(await pool.verify([text, "6"], text)) == [1.0, 0.0]
        assert pool.gauges() == QUIET


@asynchronous
async def test_one_that_raises_at_every_try_fails_the_request_and_not_the_next() -> None:
    async with running("obey_async", concurrency=4) as pool:
        with pytest.raises(RewardError, match=r"ConnectionError: the judge is busy \(in obey_async"):
            await pool.verify(["6", "raise", "hang", "6"], "6")
        assert values(await pool.verify(["6", "7"], "6")) == [1.0, 0.0]
        assert pool.gauges() == QUIET
