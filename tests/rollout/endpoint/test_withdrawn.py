"""Calls that end early: the attempt is over, the client goes away, there are too many, the engine fails."""

from __future__ import annotations

import asyncio

import pytest

from asyncdapo.rollout.endpoint.endpoint import MAX_CALLS
from tests.asynchronous import asynchronous, until
from tests.rollout.endpoint.calling import called, make_attempt
from tests.rollout.endpoint.test_generate import PROMPT
from tests.rollout.fakes import FakeEngine


@asynchronous
async def test_the_end_of_an_attempt_ends_its_calls_and_what_they_sample_is_not_captured() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with called(engine) as it:
        attempt, busy = make_attempt(engine), []
        async with it.endpoint.session(attempt, busy.append) as key:
            call = asyncio.create_task(it.post({"token_ids": [1]}, authorization=f"Bearer {key}"))
            await until(lambda: len(engine.requests) == 1)
        assert (await call)[0] == 410
        assert (engine.num_outstanding, attempt.num_turns, busy) == (0, 0, [True, False])


@asynchronous
async def test_a_client_that_goes_away_withdraws_its_call() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with called(engine) as it:
        calls = [asyncio.create_task(it.generate(PROMPT, max_tokens=2)) for _ in range(2)]
        await until(lambda: engine.num_outstanding == 2)
        calls[0].cancel()
        await until(lambda: engine.num_outstanding == 1)
        assert it.busy == [True]
        engine.gate.set()
        assert (await calls[1])[0] == 200
        assert it.attempt.num_turns == 1


@asynchronous
async def test_too_many_calls_at_the_same_time_may_be_tried_again() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with called(engine, max_turns=99, max_tokens=1000) as it:
        calls = [asyncio.create_task(it.generate([1], max_tokens=5)) for _ in range(MAX_CALLS)]
        await until(lambda: engine.num_outstanding == MAX_CALLS)
        assert (await it.generate([1], max_tokens=5))[0] == 429
        engine.gate.set()
        assert {status for status, _ in await asyncio.gather(*calls)} == {200}


@asynchronous
async def test_an_engine_that_fails_fails_the_endpoint() -> None:
    engine = FakeEngine()
    engine.error = RuntimeError("out of memory")
    async with called(engine) as it:
        assert (await it.generate(PROMPT))[0] == 500
        with pytest.raises(RuntimeError, match="out of memory"):
            await it.endpoint.failed()
