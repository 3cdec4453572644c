"""Rollout worker: its session, credits and heartbeats. Real sockets, a small engine, the test as replay server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from asyncdapo.eval_messages import EvalDone
from asyncdapo.messages import SCHEMA_VERSION, Ask, GroupDone, Heartbeat, Hello, Loaded, Score, Started
from tests.asynchronous import asynchronous
from tests.rollout.fakes import (
    GROUP_SIZE,
    HEARTBEAT_S,
    NEVER_S,
    FakeEngine,
    FakeReplay,
    join,
    joined,
    make_evaluation,
    make_lease,
    score_first_token,
)


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
    assert (hello.schema, hello.worker, hello.loaded_version, hello.branch) == (SCHEMA_VERSION, 0, 0, 0)
    assert await replay.expect(Ask) == Ask(asked=2)
    running.cancel()
    replay.close()


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
    engine = FakeEngine(num_slots=94)
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
async def test_heartbeats_tell_tokens_of_each_lease_credits_version_and_gauges() -> None:
    async with joined(FakeEngine(num_tokens=lambda _: 100_000)) as (worker, replay):
        await replay.grant(make_lease(7))
        await replay.expect(Heartbeat, lambda heartbeat: 7 in heartbeat.progress)
        await worker.load_weights(3, {})
        heartbeats = [await replay.expect(Heartbeat) for _ in range(4)]
        progress = [heartbeat.progress[7].num_tokens for heartbeat in heartbeats]
        assert progress == sorted(set(progress))
        assert (heartbeats[-1].loaded_version, heartbeats[-1].branch) == (3, 0)
        assert heartbeats[-1].progress[7].started_version == 0
        assert heartbeats[-1].asked == 2
        assert heartbeats[-1].gauges["tokens"] >= progress[-1]
        assert heartbeats[-1].gauges["scored_groups"] == 0


@asynchronous
async def test_loaded_weights_are_announced_once_and_versions_follow() -> None:
    async with joined(FakeEngine(), heartbeat_s=NEVER_S) as (worker, replay):
        await replay.expect(Heartbeat)
        replay.received.clear()
        await worker.load_weights(4, {})
        assert await replay.expect(Loaded) == Loaded(version=4, branch=0)
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
        assert (await restarted.expect(Hello)).granted == 1
        restarted.received.clear()
        assert (await restarted.expect(Heartbeat)).asked == 3
        if done not in restarted.received:
            assert await restarted.expect(GroupDone) == done
        restarted.num_granted = 1
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
async def test_a_quiet_server_is_greeted_again_and_the_session_continues() -> None:
    async with joined(FakeEngine()) as (_, replay):
        await replay.grant(make_lease(7))
        for _ in range(2):
            await replay.expect(Hello)
        await replay.expect(GroupDone)
        assert len({message.session for message in replay.received if isinstance(message, Hello)}) == 1
        assert {message.asked for message in replay.received if isinstance(message, Heartbeat)} <= {2, 3}


async def call_again_and_again(notify: Callable[[], None]) -> None:
    while True:
        notify()
        await asyncio.sleep(0)
