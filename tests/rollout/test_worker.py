"""Rollout worker: real sockets, a small engine, and the test as the replay server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from asyncdapo.errors import EngineError, RewardError, RunError
from asyncdapo.messages import (
    SCHEMA_VERSION,
    Ack,
    Ask,
    CutWanted,
    EvalAck,
    EvalDone,
    EvalRequest,
    GroupDone,
    GroupFailed,
    Heartbeat,
    Hello,
    Loaded,
    Payload,
    Reject,
    Sampling,
    Score,
    Started,
    Withdraw,
    sample_seed,
)
from asyncdapo.rollout.worker import MAX_MALFORMED
from tests.asynchronous import asynchronous
from tests.rollout.fakes import (
    GROUP_SIZE,
    HEARTBEAT_S,
    FakeEngine,
    FakeReplay,
    join,
    joined,
    make_lease,
    make_prompt,
    score_first_token,
    tokens_of,
)


NEVER_S = 1000.0
"""A heartbeat that doesn't come again during a test: what arrives was sent for its own sake."""


@asynchronous
async def test_hello_is_repeated_and_nothing_else_is_sent_until_welcome() -> None:
    worker, replay = join(FakeEngine())
    replay.welcoming = False
    running = asyncio.create_task(worker.run())
    heard = await replay.listen(heartbeats=5)
    assert len(heard) >= 2
    assert all(isinstance(message, Hello) for message in heard)
    replay.welcoming = True
    hello = await replay.expect(Hello)
    assert (hello.schema, hello.worker, hello.loaded_version) == (SCHEMA_VERSION, 0, 0)
    assert await replay.expect(Ask) == Ask(asked=2)
    running.cancel()
    replay.close()


@asynchronous
async def test_a_lease_becomes_a_scored_group_with_its_tokens() -> None:
    async with joined(FakeEngine()) as (_, replay):
        await replay.expect(Ask)
        await replay.grant(make_lease(7))
        assert await replay.expect(Started) == Started(lease_id=7, version=0)
        group = (await replay.expect(GroupDone)).group
        assert (group.lease_id, group.prompt_id, group.worker, group.num_prompt_tokens) == (7, 107, 0, 3)
        payload = Payload.from_frames(replay.frames, [group])
        tokens = [tokens_of(sample_seed(7, sample), 3) for sample in range(GROUP_SIZE)]
        np.testing.assert_array_equal(payload.prompt_ids, [1, 2, 107])
        np.testing.assert_array_equal(payload.token_ids, np.concatenate(tokens))
        np.testing.assert_array_equal(payload.logprobs, np.full(12, -0.5))
        for completion, token_ids in zip(group.completions, tokens, strict=True):
            verdict = float(token_ids[0] % 2)
            assert (completion.reward, completion.metrics) == (2 * verdict - 1, {"acc": verdict})
            assert (completion.versions, completion.loss_mask) == ([(0, 3)], [(1, 3)])


@asynchronous
async def test_what_is_asked_for_fills_the_slots_and_no_more() -> None:
    engine = FakeEngine(num_slots=10)
    engine.gate.clear()
    async with joined(engine) as (_, replay):
        assert (await replay.expect(Ask)).asked == 3
        for lease_id in range(3):
            await replay.grant(make_lease(lease_id))
            await asyncio.sleep(HEARTBEAT_S / 4)
        heartbeats = [message for message in await replay.listen(5) if isinstance(message, Heartbeat)]
        assert {heartbeat.asked for heartbeat in heartbeats} == {3}
        engine.gate.set()
        assert (await replay.expect(Ask)).asked > 3


@asynchronous
async def test_a_burst_of_leases_never_makes_it_ask_beyond_its_room() -> None:
    engine = FakeEngine(num_slots=8, num_tokens=lambda sample: 1 + 3 * sample)
    async with joined(engine) as (_, replay):
        num_granted = 0
        while num_granted < 100:
            asked = (await replay.expect(Ask)).asked
            assert engine.num_outstanding <= engine.num_slots + GROUP_SIZE
            assert asked - num_granted <= -(-engine.num_slots // GROUP_SIZE)
            for lease_id in range(num_granted, asked):
                await replay.grant(make_lease(lease_id))
            num_granted = asked


@asynchronous
async def test_a_lease_on_its_way_to_the_engine_has_taken_its_room() -> None:
    engine = FakeEngine(num_slots=100)
    engine.gate.clear()
    async with joined(engine) as (_, replay), asyncio.TaskGroup() as tasks:
        assert (await replay.expect(Ask)).asked == 25
        await replay.grant(make_lease(0))
        await replay.expect(Heartbeat, lambda heartbeat: bool(heartbeat.progress))
        hammering = tasks.create_task(call_again_and_again(engine.requests[0].on_sample_done))
        for lease_id in range(1, 25):
            await replay.grant(make_lease(lease_id))
            await asyncio.sleep(0.001)
        await replay.expect(Heartbeat, lambda heartbeat: len(heartbeat.progress) == 25)
        assert (await replay.expect(Heartbeat)).asked == 25
        hammering.cancel()


@asynchronous
async def test_the_slot_of_a_finished_sample_is_asked_for_at_once() -> None:
    engine = FakeEngine(num_slots=GROUP_SIZE, num_tokens=lambda sample: 1 if sample == 0 else 100_000)
    async with joined(engine, heartbeat_s=NEVER_S) as (_, replay):
        assert (await replay.expect(Ask)).asked == 1
        await replay.expect(Heartbeat)
        replay.received.clear()
        await replay.grant(make_lease(0))
        assert (await replay.expect(Ask)).asked == 2
        assert not any(isinstance(message, GroupDone | Heartbeat) for message in replay.received)


@pytest.mark.parametrize("kind", ["lease", "evaluation"])
@asynchronous
async def test_slots_are_filled_again_while_what_they_held_is_scored_and_the_result_is_sent_at_once(kind: str) -> None:
    scored = asyncio.Event()

    async def score(prompt, token_ids, finish_reasons, seed) -> list[Score]:
        await scored.wait()
        return await score_first_token(prompt, token_ids, finish_reasons, seed)

    async with joined(FakeEngine(num_slots=GROUP_SIZE), score, heartbeat_s=NEVER_S) as (_, replay):
        assert (await replay.expect(Ask)).asked == 1
        await replay.grant(make_lease(0) if kind == "lease" else make_evaluation(num_prompts=GROUP_SIZE))
        assert (await replay.expect(Ask)).asked == 2
        scored.set()
        await replay.expect(GroupDone if kind == "lease" else EvalDone)


@asynchronous
async def test_a_group_is_sent_again_until_it_is_acknowledged() -> None:
    async with joined(FakeEngine()) as (worker, replay):
        await replay.grant(make_lease(7))
        first = await replay.expect(GroupDone)
        assert await replay.expect(GroupDone) == first
        assert len(replay.frames) == 3
        await replay.send(Ack(lease_id=7))
        await replay.send(Ack(lease_id=7))
        await replay.listen(1)
        assert not any(isinstance(message, GroupDone) for message in await replay.listen(6))
        assert worker.gauges()["scored_groups"] == 1
        assert worker.gauges()["resent"] >= 1


@asynchronous
async def test_a_rejected_group_is_over() -> None:
    async with joined(FakeEngine()) as (worker, replay):
        await replay.grant(make_lease(7))
        await replay.expect(GroupDone)
        await replay.send(Reject(lease_id=7, reason="5 frames"))
        await replay.listen(1)
        heard = await replay.listen(6)
        assert not any(isinstance(message, GroupDone) for message in heard)
        assert all(not message.progress for message in heard if isinstance(message, Heartbeat))
        assert worker.gauges()["rejected_groups"] == 1


@asynchronous
async def test_a_withdrawn_lease_stops_generating_sends_nothing_and_makes_room() -> None:
    engine = FakeEngine(num_slots=GROUP_SIZE)
    async with joined(engine) as (worker, replay):
        await replay.expect(Ask)
        engine.gate.clear()
        await replay.grant(make_lease(7))
        await replay.expect(Heartbeat, lambda heartbeat: 7 in heartbeat.progress)
        assert engine.num_outstanding == GROUP_SIZE
        await replay.send(Withdraw(lease_ids=[7, 8]))
        assert (await replay.expect(Ask)).asked == 2
        assert engine.num_outstanding == 0
        engine.gate.set()
        assert not any(isinstance(message, GroupDone | Started) for message in await replay.listen(5))
        assert worker.gauges()["withdrawn_groups"] == 1


@asynchronous
async def test_a_withdrawn_group_that_waits_for_its_acknowledgement_is_not_sent_again() -> None:
    async with joined(FakeEngine()) as (_, replay):
        await replay.grant(make_lease(7))
        await replay.expect(GroupDone)
        await replay.send(Withdraw(lease_ids=[7]))
        await replay.listen(1)
        assert not any(isinstance(message, GroupDone) for message in await replay.listen(6))


@asynchronous
async def test_a_lease_withdrawn_in_the_same_breath_frees_its_room() -> None:
    engine = FakeEngine(num_slots=GROUP_SIZE)
    async with joined(engine) as (_, replay):
        await replay.expect(Ask)
        for lease_id in range(20):
            await replay.grant(make_lease(lease_id))
            await replay.send(Withdraw(lease_ids=[lease_id]))
            assert (await replay.expect(Ask)).asked == lease_id + 2


@asynchronous
async def test_a_lease_that_comes_twice_is_generated_once() -> None:
    engine = FakeEngine()
    async with joined(engine) as (_, replay):
        await replay.grant(make_lease(7))
        await replay.grant(make_lease(7))
        await replay.expect(GroupDone)
        await replay.send(Ack(lease_id=7))
        await replay.grant(make_lease(7))
        assert not any(isinstance(message, GroupDone) for message in await replay.listen(3))
        assert len(engine.requests) == 1


@asynchronous
async def test_a_reward_function_that_raises_fails_its_group_and_no_other() -> None:
    async def score(prompt, token_ids, finish_reasons, seed) -> list[Score]:
        if prompt.prompt_id == 107:
            raise RewardError("division by zero on prompt 107")
        return await score_first_token(prompt, token_ids, finish_reasons, seed)

    async with joined(FakeEngine(), score) as (worker, replay):
        await replay.grant(make_lease(7))
        failed = GroupFailed(lease_id=7, reason="division by zero on prompt 107")
        assert await replay.expect(GroupFailed) == failed
        assert await replay.expect(GroupFailed) == failed
        await replay.send(Ack(lease_id=7))
        await replay.listen(1)
        assert failed not in await replay.listen(6)
        await replay.grant(make_lease(8))
        assert (await replay.expect(GroupDone)).group.lease_id == 8
        assert worker.gauges()["failed_groups"] == 1


@asynchronous
async def test_an_evaluation_is_urgent_and_answered_until_acknowledged() -> None:
    engine = FakeEngine()
    async with joined(engine) as (_, replay):
        await replay.grant(make_lease(0), make_evaluation())
        done = await replay.expect(EvalDone)
        assert done.request_id == 5
        assert [answer.prompt_id for answer in done.answers] == [1, 2]
        seeds = [sample_seed(11, prompt_id) for prompt_id in (1, 2)]
        assert [answer.acc for answer in done.answers] == [float(tokens_of(seed, 3)[0] % 2) for seed in seeds]
        assert [(request.urgent, request.seeds) for request in engine.requests[1:]] == [
            (True, [seed]) for seed in seeds
        ]
        assert await replay.expect(EvalDone) == done
        await replay.send(EvalAck(request_id=5))
        await replay.listen(1)
        assert not any(isinstance(message, EvalDone) for message in await replay.listen(6))


@asynchronous
async def test_an_evaluation_costs_a_credit_like_a_lease_and_takes_the_room_of_its_prompts() -> None:
    engine = FakeEngine(num_slots=2 * GROUP_SIZE)
    engine.gate.clear()
    async with joined(engine, heartbeat_s=NEVER_S) as (_, replay):
        assert (await replay.expect(Ask)).asked == 2
        await replay.grant(make_lease(0), make_evaluation())
        assert (await replay.expect(Ask)).asked == 3
        assert engine.num_outstanding == GROUP_SIZE + 2


@asynchronous
async def test_a_held_out_prompt_on_which_the_reward_raises_counts_as_wrong() -> None:
    async def score(prompt, token_ids, finish_reasons, seed) -> list[Score]:
        if prompt.prompt_id == 1:
            raise RewardError("no")
        return [Score(reward=1.0, metrics={"acc": 1.0})]

    async with joined(FakeEngine(), score) as (_, replay):
        await replay.grant(make_evaluation())
        assert [answer.acc for answer in (await replay.expect(EvalDone)).answers] == [0.0, 1.0]


@asynchronous
async def test_heartbeats_tell_tokens_of_each_lease_credits_version_and_gauges() -> None:
    async with joined(FakeEngine(num_tokens=lambda _: 100_000)) as (worker, replay):
        await replay.grant(make_lease(7))
        await replay.expect(Heartbeat, lambda heartbeat: 7 in heartbeat.progress)
        await worker.load_weights(3, {})
        heartbeats = [await replay.expect(Heartbeat) for _ in range(4)]
        progress = [heartbeat.progress[7] for heartbeat in heartbeats]
        assert progress == sorted(set(progress))
        assert heartbeats[-1].loaded_version == 3
        assert heartbeats[-1].asked == 2
        assert heartbeats[-1].gauges["tokens"] >= progress[-1]
        assert heartbeats[-1].gauges["scored_groups"] == 0


@asynchronous
async def test_loaded_weights_are_announced_once_and_versions_follow() -> None:
    async with joined(FakeEngine(), heartbeat_s=NEVER_S) as (worker, replay):
        await replay.expect(Heartbeat)
        replay.received.clear()
        await worker.load_weights(4, {})
        assert await replay.expect(Loaded) == Loaded(version=4)
        assert len(replay.received) == 1
        await replay.grant(make_lease(7))
        assert await replay.expect(Started) == Started(lease_id=7, version=4)
        assert not any(isinstance(message, Loaded) for message in await replay.listen(2))


@asynchronous
async def test_after_a_restart_of_the_server_the_worker_joins_again_and_redelivers() -> None:
    engine = FakeEngine()
    async with joined(engine) as (_, replay):
        await replay.expect(Ask)
        await replay.grant(make_lease(7))
        done = await replay.expect(GroupDone)
        port = replay.port
        replay.close()
        restarted = await FakeReplay.restarted(port)
        await restarted.expect(Hello)
        restarted.received.clear()
        assert await restarted.expect(Ask) == Ask(asked=2)
        if done not in restarted.received:
            assert await restarted.expect(GroupDone) == done
        await restarted.grant(make_lease(8))
        await restarted.expect(GroupDone, lambda message: message.group.lease_id == 8)
        restarted.close()


@asynchronous
async def test_a_lease_lost_on_the_way_is_asked_for_again_after_the_next_welcome() -> None:
    async with joined(FakeEngine()) as (_, replay):
        assert (await replay.expect(Ask)).asked == 2
        replay.num_granted = 2
        assert (await replay.expect(Ask)).asked == 4


@asynchronous
async def test_a_quiet_server_is_greeted_again_and_the_session_goes_on() -> None:
    async with joined(FakeEngine()) as (_, replay):
        await replay.grant(make_lease(7))
        for _ in range(2):
            await replay.expect(Hello)
        await replay.expect(GroupDone)
        assert len({message.session for message in replay.received if isinstance(message, Hello)}) == 1
        assert {message.asked for message in replay.received if isinstance(message, Heartbeat)} <= {2, 3}


@asynchronous
async def test_a_deterministic_worker_generates_one_request_at_a_time() -> None:
    engine = FakeEngine(num_slots=32)
    async with joined(engine, deterministic=True) as (_, replay):
        assert (await replay.expect(Ask)).asked == 1
        engine.gate.clear()
        await replay.grant(make_evaluation())
        heartbeats = [message for message in await replay.listen(4) if isinstance(message, Heartbeat)]
        assert {heartbeat.asked for heartbeat in heartbeats} == {1}
        engine.gate.set()
        assert (await replay.expect(Ask)).asked == 2
        for lease_id in (1, 2):
            await replay.grant(make_lease(lease_id))
        for lease_id in (1, 2):
            await replay.expect(GroupDone, lambda done, lease_id=lease_id: done.group.lease_id == lease_id)
        assert engine.num_requests_at_once == 1


@asynchronous
async def test_a_raising_engine_ends_the_run_with_its_error() -> None:
    engine = FakeEngine()
    worker, replay = join(engine)
    running = asyncio.create_task(worker.run())
    await replay.expect(Hello)
    engine.gate.clear()
    await replay.grant(make_lease(0), make_lease(1))
    await replay.expect(Heartbeat, lambda heartbeat: len(heartbeat.progress) == 2)
    engine.error = EngineError("out of memory")
    engine.gate.set()
    with pytest.raises(EngineError, match="out of memory"):
        await running
    assert engine.num_outstanding == 0
    replay.close()


@asynchronous
async def test_an_error_in_an_evaluation_ends_the_run_with_that_error() -> None:
    async def score(prompt, token_ids, finish_reasons, seed) -> list[Score]:
        return [Score(reward=1.0, metrics={"f1": 1.0})]

    worker, replay = join(FakeEngine(), score)
    running = asyncio.create_task(worker.run())
    await replay.expect(Hello)
    await replay.grant(make_evaluation())
    with pytest.raises(RunError, match=r"needs the metric `acc`, the reward function returned \['f1'\]"):
        await running
    replay.close()


@asynchronous
async def test_undecodable_messages_are_counted_and_end_the_run_past_the_budget() -> None:
    worker, replay = join(FakeEngine())
    running = asyncio.create_task(worker.run())
    await replay.expect(Hello)
    for _ in range(MAX_MALFORMED):
        await replay.send(CutWanted(step=1))
    await replay.expect(Heartbeat, lambda heartbeat: heartbeat.gauges["malformed"] == MAX_MALFORMED)
    await replay.send(CutWanted(step=1))
    with pytest.raises(RunError, match="undecodable"):
        await running
    replay.close()


@asynchronous
async def test_cancelling_the_worker_withdraws_everything_from_the_engine() -> None:
    engine = FakeEngine()
    tasks_before = asyncio.all_tasks()
    async with joined(engine) as (_, replay):
        engine.gate.clear()
        await replay.grant(make_lease(0), make_evaluation())
        await replay.expect(Heartbeat, lambda heartbeat: bool(heartbeat.progress))
        assert engine.num_outstanding == GROUP_SIZE + 2
    assert engine.num_outstanding == 0
    assert asyncio.all_tasks() == tasks_before


async def call_again_and_again(notify: Callable[[], None]) -> None:
    while True:
        notify()
        await asyncio.sleep(0)


def make_evaluation(num_prompts: int = 2) -> EvalRequest:
    prompts = [make_prompt(prompt_id) for prompt_id in range(1, 1 + num_prompts)]
    return EvalRequest(request_id=5, seed=11, sampling=Sampling(temperature=0.0), prompts=prompts)
