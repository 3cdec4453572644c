"""Episodes of several turns in a worker: real sockets, a small engine, scripted environments in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from asyncdapo.errors import EpisodeError, EpisodeOver
from asyncdapo.eval_messages import EvalDone
from asyncdapo.messages import Ask, GroupDone, GroupFailed, Heartbeat, Hello, SampledTurn, Score
from asyncdapo.model.tool_calls import ToolCall
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Priority
from asyncdapo.rollout.several_turns.attempt import TurnLimits
from asyncdapo.rollout.several_turns.several_turns import SeveralTurns
from asyncdapo.rollout.several_turns.steps import Steps
from asyncdapo.rollout.worker import RolloutWorker
from asyncdapo.seeds import sample_seed
from asyncdapo.transport.payload import Payload, checksum
from tests.asynchronous import asynchronous, until
from tests.rollout.fakes import (
    GROUP_SIZE,
    HEARTBEAT_S,
    FakeEngine,
    FakeReplay,
    make_evaluation,
    make_lease,
    say_tokens,
    tokens_of,
)

OBSERVED = [50, 51]


class Scripted:
    """The environment of every episode: answers the given number of turns, and then ends with a reward of 1."""

    def __init__(self, num_turns: int = 2, first: str | None = None) -> None:
        self.num_turns, self.first = num_turns, first
        self.rows: list[dict[str, Any]] = []
        self.heard: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.over: EpisodeOver | None = None
        self.tools: list[dict[str, Any]] = []
        self.called: list[list[str]] = []
        self.reward_at_the_end = 0.0
        self.error: EpisodeError | None = None

    async def in_environment(self, row: dict[str, Any], play: Callable) -> Any:
        self.rows.append(row)
        return await play(ScriptedSession(self))

    def gauges(self) -> dict[str, float]:
        return {}


class ScriptedSession:
    def __init__(self, script: Scripted) -> None:
        self.script = script
        self.heard: list[str] = []
        self.tools = script.tools
        script.heard.append(self.heard)

    async def reset(self) -> str | None:
        return self.script.first

    async def step(self, response: str) -> tuple[str | None, float]:
        self.heard.append(response)
        await self.script.gate.wait()
        if len(self.heard) < self.script.num_turns:
            return "go on", 0.25
        if self.script.error:
            raise self.script.error
        if self.script.over:
            raise self.script.over
        return None, 1.0

    async def use_tools(self, calls: Sequence[ToolCall]) -> str:
        self.script.called.append([call.name for call in calls])
        return "used"

    async def end(self) -> tuple[dict[str, float], float]:
        return {"steps": float(len(self.heard))}, self.script.reward_at_the_end


class Encoder:
    """A response calls two tools, if there are any, and if its first token is odd."""

    def __init__(self) -> None:
        self.begun: list[tuple[Any, Any]] = []

    def begin(self, text: Any, tools: Any) -> list[int]:
        self.begun.append((text, tools))
        return [40, 41, 42]

    def tool_calls(self, response_ids: np.ndarray, tools: Any) -> list[ToolCall]:
        return [ToolCall("one"), ToolCall("two")] if tools and response_ids[0] % 2 else []

    def observe(self, text: Any) -> list[int]:
        return OBSERVED


def rate(episodes: Any, seed: int) -> list[Score]:
    return [Score(reward=one.reward, metrics={"acc": one.reward, **one.metrics}) for one in episodes]


@asynccontextmanager
async def playing(
    script: Scripted,
    engine: FakeEngine,
    *,
    max_turns: int = 4,
    max_context: int = 100,
    oversubscribe: float = 1.0,
    encoder: Encoder | None = None,
) -> AsyncIterator[FakeReplay]:
    """A running worker whose completions are episodes, and the server that has welcomed it."""
    replay = FakeReplay()
    limits = TurnLimits(max_turns=max_turns, max_context=max_context)
    rollouts = SeveralTurns(engine, script, Steps(encoder or Encoder(), say_tokens), rate, limits, oversubscribe)
    config = RolloutConfig(slots=engine.num_slots, group_size=GROUP_SIZE, max_response_length=20)
    worker = RolloutWorker(0, config, HEARTBEAT_S, engine, rollouts, say_tokens, replay.address)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(worker.run())
        try:
            await replay.expect(Hello)
            yield replay
        finally:
            running.cancel()
            replay.close()


@asynchronous
async def test_each_turn_reads_all_that_was_read_and_sampled_before() -> None:
    engine, script = FakeEngine(), Scripted()
    async with playing(script, engine) as replay:
        await replay.grant(make_lease(7))
        group = (await replay.expect(GroupDone)).group
        payload = Payload.from_frames(replay.frames, [group])
    prompt, contexts = [1, 2, 107], list(payload.of_contexts(group))
    for sample, (completion, one) in enumerate(zip(group.completions, contexts, strict=True)):
        first, second = (tokens_of(sample_seed(sample_seed(7, sample), turn), 3).tolist() for turn in range(2))
        assert one.own_ids.tolist() == [*first, *OBSERVED, *second]
        [context] = completion.contexts
        assert (context.rooted, context.sampled) == (True, [(1, 3), (0, 2), (1, 3)])
        assert (context.versions, context.loss_mask) == ([(0, 6)], [(1, 6)])
        whole = [*prompt, *first, *OBSERVED, *second]
        assert context.turns == [SampledTurn(0, 3, checksum(whole[:6], 0)), SampledTurn(1, 3, checksum(whole, 1))]
        assert (completion.reward, completion.finish_reason) == (1.25, "stop")
        assert completion.metrics == {"acc": 1.25, "steps": 2.0}
        assert script.heard[sample] == [say_tokens(np.array(first)), say_tokens(np.array(second))]
        assert [*prompt, *first, *OBSERVED] in [request.prompt_ids for request in engine.requests]
    turns = sorted((request.priority, len(request.prompt_ids)) for request in engine.requests)
    assert turns == [(Priority.CONTINUATION, 8)] * GROUP_SIZE + [(Priority.FRESH, 3)] * GROUP_SIZE


@asynchronous
async def test_an_episode_that_begins_elsewhere_is_not_rooted_in_the_prompt() -> None:
    async with playing(Scripted(num_turns=1, first="a dungeon"), FakeEngine()) as replay:
        await replay.grant(make_lease(7))
        group = (await replay.expect(GroupDone)).group
        payload = Payload.from_frames(replay.frames, [group])
    for one in payload.of_contexts(group):
        assert (one.header.rooted, one.header.sampled) == (False, [(0, 3), (1, 3)])
        assert one.own_ids[:3].tolist() == [40, 41, 42]


@asynchronous
async def test_a_response_that_calls_tools_is_answered_by_them_and_the_prompt_shows_them() -> None:
    script, encoder = Scripted(num_turns=1), Encoder()
    script.tools, script.reward_at_the_end = [{"type": "function"}], 0.5
    async with playing(script, FakeEngine(), max_turns=8, encoder=encoder) as replay:
        await replay.grant(make_lease(7))
        group = (await replay.expect(GroupDone)).group
        payload = Payload.from_frames(replay.frames, [group])
    assert encoder.begun == [("", script.tools)] * GROUP_SIZE  # a prompt without its text
    num_calling = 0
    for sample, (completion, one) in enumerate(zip(group.completions, payload.of_contexts(group), strict=True)):
        sampled = [tokens_of(sample_seed(sample_seed(7, sample), turn), 3) for turn in range(8)]
        num_turns = next(turn for turn in range(8) if sampled[turn][0] % 2 == 0) + 1
        assert one.own_ids.tolist()[3:] == [
            token for ids in sampled[:num_turns] for token in (*([] if ids is sampled[0] else OBSERVED), *ids)
        ]
        assert (completion.num_turns, completion.reward, one.header.rooted) == (num_turns, 1.5, False)
        num_calling += num_turns - 1
    assert script.called == [["one", "two"]] * num_calling
    assert num_calling


@asynchronous
async def test_limits_end_an_episode_in_its_last_sampled_token() -> None:
    cases = [
        ({"max_turns": 3}, "turns", 3),
        ({"max_context": 13}, "length", 2),  # 3 + 3 + 2 + 3, and no room behind the next observation
        ({"max_context": 12}, "length", 2),
    ]
    for limits, finish_reason, num_turns in cases:
        async with playing(Scripted(num_turns=99), FakeEngine(), **limits) as replay:
            await replay.grant(make_lease(7))
            for completion in (await replay.expect(GroupDone)).group.completions:
                assert completion.finish_reason == finish_reason
                assert completion.num_turns == num_turns
                assert completion.contexts[0].sampled[-1][0] == 1
                assert completion.reward == 0.25 * num_turns


@asynchronous
async def test_all_turns_together_have_as_many_sampled_tokens_as_a_response_may() -> None:
    engine = FakeEngine()
    async with playing(Scripted(num_turns=3), engine) as replay:
        await replay.grant(make_lease(7))
        await replay.expect(GroupDone)
    assert sorted({request.sampling.max_tokens for request in engine.requests}) == [14, 17, 20]


@asynchronous
async def test_a_step_that_took_too_long_ends_the_episode_with_what_was_sampled() -> None:
    script = Scripted()
    script.over = EpisodeOver("time", 0.5)
    async with playing(script, FakeEngine()) as replay:
        await replay.grant(make_lease(7))
        for completion in (await replay.expect(GroupDone)).group.completions:
            assert (completion.finish_reason, completion.num_turns, completion.reward) == ("time", 2, 0.75)
            assert completion.metrics == {"acc": 0.75}


@asynchronous
async def test_an_environment_that_fails_fails_its_group_and_in_an_evaluation_its_answer() -> None:
    script = Scripted()
    script.error = EpisodeError("step: ValueError: on fire")
    async with playing(script, FakeEngine()) as replay:
        await replay.grant(make_lease(7))
        failed = await replay.expect(GroupFailed)
        assert failed.reason == "the environment failed on sums row 107 (prompt 107): step: ValueError: on fire"
        await replay.grant(make_evaluation(samples=(0, 1)))
        done = await replay.expect(EvalDone)
        assert [(answer.acc, answer.failed, answer.num_tokens) for answer in done.answers] == [(0.0, True, 0)] * 4


@asynchronous
async def test_a_lease_whose_episodes_wait_for_their_environments_says_so() -> None:
    script = Scripted()
    script.gate.clear()
    async with playing(script, FakeEngine()) as replay:
        await replay.grant(make_lease(7))
        waiting = await replay.expect(Heartbeat, lambda it: 7 in it.progress and it.progress[7].phase == "environment")
        assert waiting.progress[7].num_tokens == 3 * GROUP_SIZE
        script.gate.set()
        await replay.expect(GroupDone)


@pytest.mark.parametrize(("oversubscribe", "num_groups"), [(1.0, 1), (2.0, 2)])
@asynchronous
async def test_an_episode_keeps_its_seat_while_its_environment_works_and_there_may_be_more_seats_than_slots(
    oversubscribe: float, num_groups: int
) -> None:
    script, engine = Scripted(), FakeEngine(num_slots=GROUP_SIZE)
    script.gate.clear()
    async with playing(script, engine, oversubscribe=oversubscribe) as replay:
        await replay.expect(Ask, lambda ask: ask.asked == num_groups)
        await replay.grant(*(make_lease(number) for number in range(num_groups)))
        await until(lambda: len(script.heard) == num_groups * GROUP_SIZE)
        later = await replay.listen(3)
        assert all(message.asked == num_groups for message in later if isinstance(message, Ask | Heartbeat))
        script.gate.set()
        assert (await replay.expect(Ask)).asked > num_groups


@asynchronous
async def test_an_evaluation_is_seeded_in_every_turn_and_its_answer_is_the_whole_exchange() -> None:
    engine = FakeEngine()
    async with playing(Scripted(), engine) as replay:
        await replay.grant(make_evaluation(num_prompts=1))
        done = await replay.expect(EvalDone)
    assert [request.priority for request in engine.requests] == [Priority.FRESH, Priority.CONTINUATION]
    assert all(request.seeded for request in engine.requests)
    [answer] = done.answers
    assert (answer.acc, answer.num_tokens, answer.finish_reason) == (1.25, 6, "stop")
    observed = (0, len(say_tokens(np.array(OBSERVED))))
    assert [run for run in answer.sampled if run[0] == 0] == [observed]
    assert [whose for whose, _ in answer.sampled] == [1, 0, 1]
    assert sum(length for _, length in answer.sampled) == done.response_bytes[0]
