"""Rollout worker over a rollback of the run, and over messages that come twice. Real sockets, a small engine."""

from __future__ import annotations

import asyncio

import pytest

from asyncdapo.eval_messages import EvalDone
from asyncdapo.messages import Ack, Ask, GroupDone, Heartbeat, Hello, Loaded, Message, Progress, Started, Withdraw
from asyncdapo.rollout import worker as worker_module
from asyncdapo.rollout.worker import MAX_MALFORMED
from asyncdapo.shares import CutWanted
from tests.asynchronous import asynchronous
from tests.rollout.fakes import (
    GROUP_SIZE,
    FakeEngine,
    FakeReplay,
    joined,
    make_evaluation,
    make_lease,
    score_first_token,
)


async def hold_everything(engine: FakeEngine, replay: FakeReplay) -> None:
    """A group and an evaluation that wait for their acknowledgement, a lease that runs."""
    await replay.grant(make_lease(7), make_evaluation())
    await replay.expect(EvalDone)
    await replay.expect(GroupDone)
    engine.gate.clear()
    await replay.grant(make_lease(8))
    await replay.expect(Heartbeat, lambda heartbeat: 8 in heartbeat.progress)


def results(messages: list[Message]) -> list[Message]:
    return [message for message in messages if isinstance(message, GroupDone | EvalDone | Started)]


async def told_of(replay: FakeReplay, version: int, branch: int) -> None:
    """A worker that is just greeting a quiet server says it with its `Hello`."""
    news = await replay.expect(Hello | Loaded, lambda news: news.branch == branch)
    assert (news.version if isinstance(news, Loaded) else news.loaded_version) == version


@asynchronous
async def test_with_weights_of_a_new_branch_nothing_is_sent_of_what_was_held() -> None:
    engine = FakeEngine()
    async with joined(engine) as (worker, replay):
        await hold_everything(engine, replay)
        await worker.load_weights(3, {}, branch=1)
        await told_of(replay, version=3, branch=1)
        engine.gate.set()
        heard = await replay.listen(8)
        assert results(heard) == []
        beats = [message for message in heard if isinstance(message, Heartbeat)]
        assert {(beat.loaded_version, beat.branch, len(beat.progress)) for beat in beats} == {(3, 1, 0)}
        assert engine.num_outstanding == 0
        await replay.grant(make_lease(9))
        assert (await replay.expect(GroupDone)).group.lease_id == 9


@asynchronous
async def test_a_server_in_a_new_branch_ends_what_was_held_before_its_weights_come() -> None:
    engine = FakeEngine()
    async with joined(engine) as (worker, replay):
        await hold_everything(engine, replay)
        replay.branch = 1
        await replay.expect(Hello)  # the quiet server is greeted again, and its Welcome names the branch
        await replay.expect(Ask)  # with the room that this has made
        replay.received.clear()
        engine.gate.set()
        assert results(await replay.listen(6)) == []
        assert {m.branch for m in replay.received if isinstance(m, Hello | Heartbeat)} == {0}
        await worker.load_weights(0, {}, branch=1)
        await told_of(replay, version=0, branch=1)


@asynchronous
async def test_weights_of_the_same_branch_end_nothing() -> None:
    engine = FakeEngine(num_tokens=lambda _: 50)
    async with joined(engine) as (worker, replay):
        await worker.load_weights(1, {}, branch=1)
        await replay.grant(make_lease(7))
        await replay.expect(Started)
        await worker.load_weights(2, {}, branch=1)
        assert (await replay.expect(GroupDone)).group.lease_id == 7


@asynchronous
async def test_a_lease_that_comes_again_is_generated_once_whether_held_or_over() -> None:
    engine = FakeEngine()
    async with joined(engine) as (_, replay):
        await replay.grant(make_lease(7))
        await replay.send(make_lease(7))
        await replay.expect(GroupDone)
        await replay.send(Ack(lease_id=7))
        await replay.send(make_lease(7))
        await replay.send(Withdraw(lease_ids=[8]))
        await replay.send(make_lease(8))
        await replay.listen(4)
        assert len(engine.requests) == 1


@asynchronous
async def test_only_the_latest_leases_that_are_over_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "REMEMBERED", 3)
    engine = FakeEngine()
    async with joined(engine) as (_, replay):
        for lease_id in range(1, 6):
            await replay.grant(make_lease(lease_id))
            await replay.expect(GroupDone, lambda done, lease_id=lease_id: done.group.lease_id == lease_id)
            await replay.send(Ack(lease_id=lease_id))
        for lease_id in (3, 4, 5):
            await replay.send(make_lease(lease_id))
        await replay.listen(3)
        assert len(engine.requests) == 5
        await replay.send(make_lease(2))
        await replay.expect(GroupDone, lambda done: done.group.lease_id == 2)
        assert len(engine.requests) == 6


@asynchronous
async def test_heartbeats_tell_a_lease_that_waits_from_one_that_runs_and_one_that_is_sampled() -> None:
    engine = FakeEngine(num_slots=GROUP_SIZE)
    async with joined(engine) as (_, replay):
        engine.gate.clear()
        await replay.grant(make_lease(7))
        assert (await phase_of(replay, 7, "sampling")).started_version is None
        engine.requests[0].num_running = 0  # as an engine does whose slots others have
        await phase_of(replay, 7, "waiting")
        engine.gate.set()
        sampled = await phase_of(replay, 7, "sampled")
        assert (sampled.num_tokens, sampled.started_version) == (3 * GROUP_SIZE, 0)
        await replay.send(Ack(lease_id=7))
        await replay.expect(Heartbeat, lambda heartbeat: not heartbeat.progress)


@asynchronous
async def test_a_lease_is_sampled_and_not_stalled_while_its_verifier_takes_long() -> None:
    async def score(*_: object) -> None:
        await asyncio.Event().wait()

    async with joined(FakeEngine(), score) as (_, replay):
        await replay.grant(make_lease(7))
        await phase_of(replay, 7, "sampled")


async def phase_of(replay: FakeReplay, lease_id: int, phase: str) -> Progress:
    beat = await replay.expect(
        Heartbeat, lambda beat: lease_id in beat.progress and beat.progress[lease_id].phase == phase
    )
    return beat.progress[lease_id]


@asynchronous
async def test_undecodable_messages_now_and_then_end_nothing() -> None:
    async with joined(FakeEngine(), score_first_token) as (worker, replay):
        for lease_id in range(2 * MAX_MALFORMED):
            await replay.send(CutWanted(step=1))
            await replay.send(Ack(lease_id=lease_id))
        await replay.expect(Heartbeat, lambda heartbeat: heartbeat.gauges["malformed"] == 2 * MAX_MALFORMED)
        await replay.grant(make_lease(100))
        await replay.expect(GroupDone)
