"""Groups at the replay server: acknowledged after the commit, repeated, late, or rejected."""

import asyncio

import pytest

from asyncdapo.messages import Ack, GroupDone, GroupFailed, Lease, Reject, Withdraw
from asyncdapo.replay.core import events as core
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.shares import for_learner
from tests.asynchronous import asynchronous
from tests.episodes import Episodes
from tests.replay.serving import FakeLearner, FakeWorker, rows, serving, tokens_of
from tests.replay.small_run import make_group, prompt_at


@asynchronous
async def test_a_group_is_acknowledged_when_the_ledger_has_it(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        await worker.answer(lease)
        assert await worker.take(Ack) == Ack(lease_id=lease.lease_id)
        assert rows(tmp_path, "SELECT group_id, state FROM groups") == [(lease.lease_id, "queued")]


class FullDisk(Journal):
    """A journal that can't take in groups."""

    def write(self, event, actions, **facts):
        if isinstance(event, core.GroupArrived):
            raise OSError("no space left on device")
        super().write(event, actions, **facts)


@asynchronous
async def test_a_group_that_the_journal_could_not_take_is_never_acknowledged(tmp_path):
    async with serving(tmp_path, make_journal=FullDisk) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        await worker.answer(lease)
        with pytest.raises(OSError, match="no space left"):
            await server.serving
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(worker.take(Ack), 0.1)
        server.serving = asyncio.create_task(asyncio.sleep(0))


@asynchronous
async def test_a_repeated_group_is_acknowledged_again_and_counted_once(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        for _ in range(3):
            await worker.answer(lease)
            assert await worker.take(Ack) == Ack(lease_id=lease.lease_id)
        assert rows(tmp_path, "SELECT COUNT(*) FROM groups") == [(1,)]
        assert rows(tmp_path, "SELECT kind FROM events WHERE kind = 'late'") == []


@asynchronous
async def test_a_late_group_is_acknowledged_and_dropped(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        await server.finish()
        assert await worker.take(Withdraw) == Withdraw(lease_ids=[lease.lease_id])
        await worker.answer(lease)
        assert await worker.take(Ack) == Ack(lease_id=lease.lease_id)
        assert rows(tmp_path, "SELECT COUNT(*) FROM groups") == [(0,)]
        assert rows(tmp_path, "SELECT lease_id FROM events WHERE kind = 'late'") == [(lease.lease_id,)]


@asynchronous
async def test_a_failed_reward_ends_the_prompt_and_is_acknowledged_each_time(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        for _ in range(2):
            await worker.client.send(GroupFailed(lease_id=lease.lease_id, reason="ZeroDivisionError"))
            assert await worker.take(Ack) == Ack(lease_id=lease.lease_id)
        assert rows(tmp_path, "SELECT prompt_id FROM prompts WHERE state = 'failed'") == [(0,)]
        assert rows(tmp_path, "SELECT detail FROM events WHERE kind = 'failed'") == [("ZeroDivisionError",)]


def episodes(lease, change=list):
    return Episodes(lease.lease_id).group(
        lease.prompt.prompt_id,
        group_size=2,
        prompt_ids=lease.prompt.token_ids,
        change=change,
        lease_id=lease.lease_id,
    )


@asynchronous
async def test_episodes_reach_the_learner_with_all_their_contexts(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        leases = await worker.leases(3)
        for lease in leases:
            await worker.send_group(*episodes(lease))
            assert await worker.take(Ack) == Ack(lease_id=lease.lease_id)
        await learner.want(1)
        batch = await learner.receive()
        by_id = {lease.lease_id: episodes(lease) for lease in leases}
        for group, part in zip(batch.groups, tokens_of(tmp_path, batch), strict=True):
            sent, payload = by_id[group.lease_id]
            assert group == for_learner(sent)
            assert part.frames() == payload.frames()


@asynchronous
async def test_an_episode_whose_turn_was_sampled_behind_other_tokens_is_rejected(tmp_path):
    def retokenise(made):
        made[1][0].token_ids[0] += 1

    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        await worker.send_group(*episodes(lease, retokenise))
        reject = await worker.take(Reject)
        assert reject.reason == "completion 1: turn 0 was sampled behind other tokens, or is another one"


@asynchronous
async def test_a_group_with_two_frames_is_rejected(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        group, payload = make_group(lease)
        await worker.client.send(GroupDone(group=group), payload.frames()[:2])
        assert (await worker.take(Reject)).lease_id == lease.lease_id


@asynchronous
async def test_another_workers_lease_is_rejected_and_lives_on(tmp_path):
    async with serving(tmp_path) as server:
        owner, thief = FakeWorker(server, 0), FakeWorker(server, 1)
        await owner.join()
        await thief.join()
        await server.begin()
        lease, _ = await owner.leases(2)
        await thief.send_group(*make_group(lease, worker=0))
        await thief.take(Reject)
        await thief.client.send(GroupFailed(lease_id=lease.lease_id, reason=""))
        await thief.take(Reject)
        await owner.answer(lease)
        await owner.take(Ack)


@asynchronous
async def test_a_lease_that_was_never_granted_is_rejected_without_a_trace(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        for lease_id in (77, 1 << 63):
            group, payload = make_group(
                Lease(lease_id=lease_id, branch=0, attempt=1, group_size=2, seed=1, prompt=prompt_at(0))
            )
            await worker.send_group(group, payload)
            assert (await worker.take(Reject)).lease_id == lease_id
        assert rows(tmp_path, "SELECT kind FROM events") == [("worker_joined",)]
