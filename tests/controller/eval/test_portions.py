"""Portions of an evaluation: few calls at a time, which hand on their answers as they arrive."""

from __future__ import annotations

import asyncio

import pytest

from asyncdapo.config.run import EvalConfig
from asyncdapo.controller.eval.evaluation import MAX_CALLS
from asyncdapo.errors import RunError
from asyncdapo.eval_messages import EvalAnswer, EvalRequest
from tests.controller.eval.test_evaluation import answer_at_once, make, respond


class Replay:
    """Answers a call when it is let go."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[EvalRequest], asyncio.Future[None]]] = []
        self.num_open = 0

    async def ask(self, requests: list[EvalRequest]) -> list[EvalAnswer]:
        let_go: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.calls.append((requests, let_go))
        self.num_open += 1
        try:
            await let_go
        finally:
            self.num_open -= 1
        return await answer_at_once(requests)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("chunk", "total_slots"), [(4, 8), (4, 4096), (16, 100_000), (1, 1)])
def test_few_calls_ask_for_more_than_all_slots_can_take(chunk: int, total_slots: int) -> None:
    async def begin() -> tuple[int, int]:
        replay = Replay()
        config = EvalConfig(num_prompts=10, num_samples=50_000)
        running = asyncio.ensure_future(
            make(config, replay.ask, chunk=chunk, total_slots=total_slots).run(greedy=False)
        )
        await settle()
        running.cancel()
        return len(replay.calls), sum(request.num_sequences for requests, _ in replay.calls for request in requests)

    num_calls, num_sequences = asyncio.run(begin())
    assert num_calls == MAX_CALLS
    assert num_sequences >= 1.5 * total_slots


def test_answers_are_handed_on_as_they_arrive_and_the_next_portion_is_asked_for() -> None:
    async def scenario() -> None:
        replay, arrived = Replay(), []
        evaluation = make(EvalConfig(num_prompts=10, num_samples=40), replay.ask)
        running = asyncio.ensure_future(evaluation.run(greedy=False, on_answers=arrived.append))
        await settle()
        requests, let_go = replay.calls[3]
        let_go.set_result(None)
        await settle()
        assert [[one.answer for one in portion] for portion in arrived] == [respond(requests[0])]
        assert len(replay.calls) == MAX_CALLS + 1
        while not running.done():
            for _, let_go in replay.calls:
                if not let_go.done():
                    let_go.set_result(None)
            await settle()
        assert sum(map(len, arrived)) == evaluation.total(greedy=False) == 400
        assert not any(one.greedy for portion in arrived for one in portion)

    asyncio.run(scenario())


def test_a_call_that_fails_ends_the_evaluation_with_its_error() -> None:
    async def scenario() -> None:
        replay = Replay()
        running = asyncio.ensure_future(make(EvalConfig(num_samples=40), replay.ask).run(greedy=False))
        await settle()
        replay.calls[5][1].set_exception(RunError("given out 5 times"))
        with pytest.raises(RunError, match="given out 5 times"):
            await running
        assert replay.num_open == 0

    asyncio.run(scenario())


def test_an_evaluation_that_is_cancelled_asks_for_nothing_more() -> None:
    async def scenario() -> None:
        replay = Replay()
        running = asyncio.ensure_future(make(EvalConfig(num_samples=40), replay.ask).run(greedy=False))
        await settle()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (len(replay.calls), replay.num_open) == (MAX_CALLS, 0)

    asyncio.run(scenario())
