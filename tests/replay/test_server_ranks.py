"""The replay server and a learner of several ranks, over real sockets."""

import asyncio
import threading

import msgspec
import pytest

from asyncdapo.learner.batches.feed import BatchFeed
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.shares import Dealer, NoBatch, share_of
from tests.asynchronous import TEST_TIMEOUT_S, asynchronous
from tests.replay.serving import FakeLearner, FakeWorker, serving, tokens_of, until
from tests.replay.small_run import make_group


class CountingDealer(Dealer):
    """Counts what it has dealt."""

    num_dealt = 0

    def deal(self, groups):
        type(self).num_dealt += 1
        return super().deal(groups)


@asynchronous
async def test_every_rank_gets_the_same_batch_and_finds_the_tokens_of_its_completions(tmp_path):
    """Rank 0 asks before the batch is cut, the others after; a group is spread over ranks, and the last rank has no
    completion. The verifier's numbers, which may be many, don't travel."""
    async with serving(
        tmp_path, prompts_per_step=3, server_settings={"dealer": CountingDealer(num_ranks=5, num_updates=2)}
    ) as server:
        worker = FakeWorker(server)
        ranks = [FakeLearner(server, b"rank %d" % rank) for rank in range(5)]
        await worker.join()
        await server.begin()
        await ranks[0].want(1, rank=0)
        leases = await worker.leases(3)
        for lease in leases:
            await worker.answer(lease)
        answers = [await ranks[0].receive()]
        for rank, learner in enumerate(ranks[1:], start=1):
            await learner.want(1, rank=rank)
            answers.append(await learner.receive())
        batch = answers[0]
        assert all(completion.metrics == {} for group in batch.groups for completion in group.completions)
        by_id = {lease.lease_id: lease for lease in leases}
        trained_on = []
        for rank, same in enumerate(answers):
            assert same == batch
            share = share_of(batch, rank)
            whole = [make_group(by_id[piece.header.lease_id]) for piece in share]
            wanted = [
                payload.of_completions(group, piece.indices)
                for (group, payload), piece in zip(whole, share, strict=True)
            ]
            read = tokens_of(tmp_path, batch, rank)
            assert [one.frames() for one in read] == [one.frames() for one in wanted]
            trained_on += [(piece.place, index) for piece in share for index in piece.indices]
        assert sorted(trained_on) == [(place, index) for place in range(3) for index in range(2)]
        assert [len(share_of(batch, rank)) for rank in range(5)] == [2, 2, 1, 1, 0]
        assert CountingDealer.num_dealt == 1


@asynchronous
async def test_a_batch_is_dealt_as_before_by_a_server_that_was_started_again(tmp_path):
    dealer = {"dealer": Dealer(num_ranks=2)}
    async with serving(tmp_path, prompts_per_step=3, server_settings=dealer) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await learner.want(1, rank=1)
        await worker.work_off(3)
        batch = await learner.receive()
    async with serving(tmp_path, prompts_per_step=3, server_settings=dealer) as server:
        learner = FakeLearner(server)
        await learner.want(1, rank=1)
        assert await learner.receive() == batch


@asynchronous
async def test_a_group_is_acknowledged_while_the_headers_of_a_batch_are_read(tmp_path):
    """A batch may have thousands."""
    reading, may_end = threading.Event(), threading.Event()

    class SlowJournal(Journal):
        def read_header(self, group_id, place):
            reading.set()
            assert may_end.wait(TEST_TIMEOUT_S)
            return super().read_header(group_id, place)

    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        await worker.work_off(2)
    async with serving(tmp_path, make_journal=SlowJournal) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await learner.want(1)
        assert await asyncio.to_thread(reading.wait, TEST_TIMEOUT_S)
        await worker.work_off(1)
        may_end.set()
        batch = await learner.receive()
        assert batch.step == 1


@asynchronous
async def test_a_batch_has_room_for_the_headers_of_all_its_groups(tmp_path):
    """Each of which is sent by a worker alone: here 5 MB, of a mask that changes with each token."""
    num_tokens = 900_000
    async with serving(tmp_path) as server:
        worker, feed = FakeWorker(server), BatchFeed(server.learner_address, tmp_path)
        await worker.join()
        await server.begin()
        for lease in await worker.leases(2):
            group, payload = make_group(lease, versions=((0, num_tokens),))
            for completion in group.completions:
                completion.contexts[0].loss_mask[:] = [(1, 1)] * num_tokens
            await worker.send_group(group, payload)
        batch, share = await feed.take(1)
        payloads = await feed.read(1, share)
        feed.close()
        assert len(msgspec.msgpack.encode(batch)) > 10_000_000
        assert sum(one.num_bytes for one in payloads) > 2 * 2 * 8 * num_tokens


@asynchronous
async def test_the_end_of_the_data_reaches_every_rank(tmp_path):
    async with serving(tmp_path, num_prompts=1, server_settings={"dealer": Dealer(num_ranks=2)}) as server:
        worker = FakeWorker(server)
        ranks = [FakeLearner(server, name) for name in (b"one", b"two")]
        await worker.join()
        await server.begin()
        for rank, learner in enumerate(ranks):
            await learner.want(1, rank=rank)
        await worker.work_off(1)
        for learner in ranks:
            answer = await learner.receive()
            assert isinstance(answer, NoBatch)


@pytest.mark.parametrize("question", [{"rank": 1}, {"rank": -1}, {"rank": 1 << 40}])
@asynchronous
async def test_a_question_that_no_rank_asks_is_malformed(tmp_path, question):
    async with serving(tmp_path) as server:
        learner = FakeLearner(server)
        await learner.want(1, **question)
        await until(lambda: server.status()["dropped"]["malformed"] == 1, server)
