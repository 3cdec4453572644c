"""Rollout worker: what becomes of leases and evaluations. Real sockets, a small engine, the test as replay server."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from asyncdapo.errors import EngineError, RewardError, RunError
from asyncdapo.eval_messages import EvalAck, EvalDone
from asyncdapo.messages import (
    Ack,
    Ask,
    Context,
    GroupDone,
    GroupFailed,
    Heartbeat,
    Hello,
    Reject,
    Score,
    Started,
    Withdraw,
)
from asyncdapo.rollout.episodes import AHEAD
from asyncdapo.rollout.worker import MAX_MALFORMED
from asyncdapo.seeds import eval_seed, sample_seed
from asyncdapo.shares import CutWanted
from asyncdapo.transport.payload import Payload, checksum, unpack_answers
from tests.asynchronous import asynchronous, until
from tests.rollout.fakes import (
    GROUP_SIZE,
    NEVER_S,
    FakeEngine,
    join,
    joined,
    make_evaluation,
    make_lease,
    say_tokens,
    score_first_token,
    tokens_of,
)


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
            crc = checksum([1, 2, 107, *token_ids], 0)
            assert completion.contexts == [Context.of_turn([(0, 3)], [(1, 3)], crc)]


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
        await until(lambda: engine.num_outstanding == GROUP_SIZE)
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
async def test_an_evaluation_waits_its_turn_is_seeded_and_answered_until_acknowledged() -> None:
    engine = FakeEngine()
    async with joined(engine) as (_, replay):
        await replay.grant(make_lease(0), make_evaluation())
        done = await replay.expect(EvalDone)
        assert done.request_id == 5
        assert [answer.prompt_id for answer in done.answers] == [1, 2]
        seeds = [sample_seed(11, prompt_id) for prompt_id in (1, 2)]
        assert [answer.acc for answer in done.answers] == [float(tokens_of(seed, 3)[0] % 2) for seed in seeds]
        of_lease, *of_evaluation = engine.requests
        assert not of_lease.seeded
        assert [(request.priority, request.seeded, request.seeds) for request in of_evaluation] == [
            (of_lease.priority, True, [seed]) for seed in seeds
        ]
        assert await replay.expect(EvalDone) == done
        await replay.expect(Heartbeat, lambda heartbeat: heartbeat.evaluations == [5])
        await replay.send(EvalAck(request_id=5))
        await replay.expect(Heartbeat, lambda heartbeat: heartbeat.evaluations == [])
        assert not any(isinstance(message, EvalDone) for message in await replay.listen(6))


@asynchronous
async def test_the_samples_of_a_held_out_prompt_share_a_request_of_the_engine() -> None:
    engine = FakeEngine()
    async with joined(engine) as (_, replay):
        await replay.grant(make_evaluation(samples=(0, 3), temperature=1.0))
        done = await replay.expect(EvalDone)
        answers = unpack_answers(done, replay.frames)
        assert [(answer.prompt_id, answer.sample) for answer in answers] == [(1, 0), (1, 3), (2, 0), (2, 3)]
        seeds = [[eval_seed(11, prompt_id, sample) for sample in (0, 3)] for prompt_id in (1, 2)]
        assert [request.seeds for request in engine.requests] == seeds
        sampled = [tokens_of(seed, 3) for of_prompt in seeds for seed in of_prompt]
        assert [answer.response for answer in answers] == [say_tokens(token_ids) for token_ids in sampled]
        assert [answer.acc for answer in answers] == [float(token_ids[0] % 2) for token_ids in sampled]
        assert [answer.pred for answer in answers] == [str(token_ids[0]) for token_ids in sampled]


@pytest.mark.parametrize(("num_prompts", "samples"), [(2, (0,)), (1, (0, 1))])
@asynchronous
async def test_an_evaluation_costs_a_credit_and_takes_the_room_of_its_samples(num_prompts, samples) -> None:
    engine = FakeEngine(num_slots=2 * GROUP_SIZE)
    engine.gate.clear()
    async with joined(engine, heartbeat_s=NEVER_S) as (_, replay):
        assert (await replay.expect(Ask)).asked == 2
        await replay.grant(make_lease(0), make_evaluation(num_prompts, samples))
        assert (await replay.expect(Ask)).asked == 3
        await until(lambda: engine.num_outstanding == GROUP_SIZE + 2)


@asynchronous
async def test_an_answer_on_which_the_reward_raises_counts_as_wrong_and_no_other_does() -> None:
    async def score(prompt, token_ids, finish_reasons, seed) -> list[Score]:
        if seed == eval_seed(11, 1, 1):
            raise RewardError("no")
        return [Score(reward=1.0, metrics={"acc": 1.0}, pred="6")]

    async with joined(FakeEngine(), score) as (_, replay):
        await replay.grant(make_evaluation(samples=(0, 1)))
        answers = unpack_answers(await replay.expect(EvalDone), replay.frames)
        assert [(answer.acc, answer.pred) for answer in answers] == [(1.0, "6"), (0.0, None), (1.0, "6"), (1.0, "6")]
        assert [answer.failure for answer in answers] == ["", "no", "", ""]
        assert answers[1].response == say_tokens(tokens_of(eval_seed(11, 1, 1), 3))


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
        raise RunError("no process of the verifier can be started")

    worker, replay = join(FakeEngine(), score)
    running = asyncio.create_task(worker.run())
    await replay.expect(Hello)
    await replay.grant(make_evaluation())
    with pytest.raises(RunError, match="no process of the verifier can be started"):
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
    for _ in range(MAX_MALFORMED + 1):  # a repeated Hello, and its Welcome, may have come between those before
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
        await until(lambda: engine.num_outstanding == GROUP_SIZE + 2)
    assert engine.num_outstanding == 0
    assert asyncio.all_tasks() == tasks_before


@asynchronous
async def test_sequences_wait_in_the_engine_for_the_next_slots_that_become_free() -> None:
    engine = FakeEngine(num_slots=32)
    engine.gate.clear()
    async with joined(engine, heartbeat_s=NEVER_S) as (_, replay):
        num_groups = (32 + 32 // AHEAD) // GROUP_SIZE + 1
        assert (await replay.expect(Ask)).asked == num_groups
        await replay.grant(*map(make_lease, range(num_groups)))
        await until(lambda: engine.num_outstanding == num_groups * GROUP_SIZE)
