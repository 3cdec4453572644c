"""The replay server and a learner of several ranks, over real sockets."""

import asyncio

import pytest

from asyncdapo.messages import NoBatch
from asyncdapo.payload import Payload
from asyncdapo.shares import deal, share_of
from tests.replay.serving import FakeLearner, FakeWorker, scenario, serving, until
from tests.replay.small_run import make_group


@scenario
async def test_every_rank_gets_all_headers_and_the_payload_of_its_share(tmp_path):
    """One asks before the batch is cut, one after, one for fewer updates and a share without a group. The verifier's
    numbers, which may be many, don't travel."""
    async with serving(tmp_path, prompts_per_step=3) as server:
        worker = FakeWorker(server)
        first, second, other = (FakeLearner(server, name) for name in (b"one", b"two", b"three"))
        await worker.join()
        await server.begin()
        await first.want(1, rank=0, num_ranks=2, num_updates=2)
        leases = await worker.leases(3)
        for lease in leases:
            await worker.answer(lease)
        batch, frames = await first.receive()
        assert all(completion.metrics == {} for group in batch.groups for completion in group.completions)
        shares = {0: frames}
        await second.want(1, rank=1, num_ranks=2, num_updates=2)
        same, shares[1] = await second.receive()
        assert same == batch
        by_id = {lease.lease_id: lease for lease in leases}
        trained_on = []
        for rank, payload in shares.items():
            share = share_of(deal(batch.groups, num_updates=2, num_ranks=2), rank)
            groups = [batch.groups[place] for place in share]
            wanted = [make_group(by_id[group.lease_id])[1] for group in groups]
            assert Payload.from_frames(payload, groups).frames() == Payload.join(wanted).frames()
            trained_on += share
        assert sorted(trained_on) == [0, 1, 2]
        await other.want(1, rank=3, num_ranks=4, num_updates=1)
        same, frames = await other.receive()
        assert same == batch
        assert [len(frame) for frame in frames] == [0, 0, 0]


@scenario
async def test_the_end_of_the_data_reaches_every_rank(tmp_path):
    async with serving(tmp_path, num_prompts=1) as server:
        worker = FakeWorker(server)
        ranks = [FakeLearner(server, name) for name in (b"one", b"two")]
        await worker.join()
        await server.begin()
        for rank, learner in enumerate(ranks):
            await learner.want(1, rank=rank, num_ranks=2)
        await worker.work_off(1)
        for learner in ranks:
            answer, _ = await learner.receive()
            assert isinstance(answer, NoBatch)


@pytest.mark.parametrize(
    "question", [{"rank": 1}, {"rank": -1}, {"num_ranks": 0}, {"num_ranks": 1 << 40}, {"num_updates": 0}]
)
def test_a_question_that_no_rank_asks_is_malformed(tmp_path, question):
    async def run():
        async with serving(tmp_path) as server:
            learner = FakeLearner(server)
            await learner.want(1, **question)
            await until(lambda: server.status()["dropped"]["malformed"] == 1, server)

    asyncio.run(asyncio.wait_for(run(), 20))
