"""The replay server over real sockets: leases, the learner, and a whole run."""

import asyncio
import random

import pytest

from asyncdapo.errors import RunError
from asyncdapo.eval_messages import EvalRequest
from asyncdapo.messages import Ack, Lease, Loaded, Started, Welcome
from asyncdapo.replay.config import FilterConfig
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.seeds import sample_seed
from asyncdapo.shares import NoBatch, for_learner
from tests.asynchronous import asynchronous
from tests.replay.serving import FakeLearner, FakeWorker, eval_request, rows, serving, tokens_of, until
from tests.replay.small_run import make_group, prompt_at, write_files

# --------------------------------------------------------------------------------------------------------------- leases


@asynchronous
async def test_leases_are_granted_from_begin_on_up_to_the_credits(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        assert await worker.join() == Welcome(branch=0, granted=0)
        await worker.ask(2)
        assert await worker.unread() == []
        assert server.status()["first_lease_at_s"] is None
        await server.begin()
        first, second = await worker.take(Lease), await worker.take(Lease)
        assert (first.prompt, second.prompt) == (prompt_at(0), prompt_at(1))
        assert (first.group_size, first.attempt, first.seed) == (2, 1, sample_seed(1, 0))
        assert await worker.unread() == []
        assert server.status()["first_lease_at_s"] > 0


@asynchronous
async def test_a_repeated_ask_is_owed_nothing_more(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        await worker.leases(2)
        await worker.ask(0)
        await worker.beat()
        assert await worker.unread() == []


@asynchronous
async def test_a_worker_that_says_hello_again_keeps_its_leases_and_its_count(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        again = FakeWorker(server, session=worker.session)
        worker.close()
        assert await again.join() == Welcome(branch=0, granted=2)
        await again.answer(lease)
        assert await again.take(Ack) == Ack(lease_id=lease.lease_id)


@pytest.mark.parametrize("hello", [{"schema": 99}, {"version": 1}, {"version": -1}])
@asynchronous
async def test_a_worker_of_another_schema_or_with_weights_of_another_run_is_not_welcome(tmp_path, hello):
    async with serving(tmp_path) as server:
        stranger = FakeWorker(server)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stranger.join(**hello), 0.2)
        await until(lambda: server.status()["dropped"]["malformed"] == 1, server)
        assert server.status()["workers"] == 0


@asynchronous
async def test_started_and_loaded_reach_the_ledger(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        await worker.client.send(Started(lease_id=lease.lease_id, version=0))
        await worker.client.send(Loaded(version=7, branch=0))
        await worker.client.send(Started(lease_id=lease.lease_id, version=7))
        await worker.unread()
        assert rows(tmp_path, f"SELECT started_version FROM leases WHERE lease_id = {lease.lease_id}") == [(0,)]
        assert rows(tmp_path, "SELECT version FROM loads") == [(0,)]


# -------------------------------------------------------------------------------------------------------------- learner


@asynchronous
async def test_the_learner_gets_its_batch_when_it_is_full_after_the_ledger_has_the_cut(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await learner.want(1)
        leases = await worker.leases(3)
        for lease in reversed(leases):
            await worker.answer(lease)
        batch = await learner.receive()
        assert rows(tmp_path, "SELECT group_id FROM groups WHERE state = 'cut' AND step = 1 ORDER BY prompt_id") == [
            (group.lease_id,) for group in batch.groups
        ]
        assert (batch.step, batch.max_staleness) == (1, 1)
        prompts = [group.prompt_id for group in batch.groups]
        assert prompts == sorted(prompts)
        parts = tokens_of(tmp_path, batch)
        by_id = {lease.lease_id: lease for lease in leases}
        for group, part in zip(batch.groups, parts, strict=True):
            expected, payload = make_group(by_id[group.lease_id])
            assert group == for_learner(expected)
            assert part.frames() == payload.frames()


@asynchronous
async def test_a_batch_is_the_same_however_often_and_by_whom_it_is_wanted(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await worker.work_off(3)
        await learner.want(1)
        first = await learner.receive()
        learner.close()
        restarted = FakeLearner(server, b"restarted")
        for _ in range(2):
            await restarted.want(1)
            assert await restarted.receive() == first


@asynchronous
async def test_trained_returns_the_metrics_of_the_step(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        solved, wrong, *kept = await worker.leases(4)
        await worker.answer(solved, accs=(1.0, 1.0))
        await worker.answer(wrong, accs=(0.0, 0.0))
        for lease in kept:
            await worker.answer(lease)
        await learner.want(1)
        await learner.receive()
        await worker.beat(tokens=40)
        await worker.unread()
        metrics = await server.trained(1, {"learner/loss": 0.5})
        expected = {
            "reward/mean": 0.0,
            "reward/filtered_mean": 0.0,
            "filter/kept_ratio": 0.5,
            "filter/all_correct_ratio": 0.25,
            "filter/all_wrong_ratio": 0.25,
            "rollout/truncated_ratio": 0.0,
            "rollout/response_tokens_mean": 4.0,
            "rollout/tokens": 40,
            "replay/trained_groups": 2,
            "replay/staleness_max": 0,
            "replay/staleness_mean": 0.0,
            "replay/tokens_trained": 16,
            "replay/tokens_filtered": 16,
            "replay/queued": 0,
            "replay/running": 0,
            "replay/duplicates": 0,
            "replay/dropped_ratio": 0.0,
        }
        assert metrics | expected == metrics
        assert rows(tmp_path, "SELECT step, groups, learner_version FROM batches") == [(1, 2, 0)]


@asynchronous
async def test_the_limit_of_generation_batches_ends_the_run_with_its_cause(tmp_path):
    limit = FilterConfig(max_gen_batches=1, on_limit="raise")
    async with serving(tmp_path, filter=limit) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        for lease in await worker.leases(2):
            await worker.answer(lease, accs=(1.0, 1.0))
        with pytest.raises(RunError, match="max_gen_batches"):
            await server.serving
        server.serving = asyncio.create_task(asyncio.sleep(0))


@asynchronous
async def test_when_the_data_is_used_up_the_learner_is_told_and_evaluation_continues(tmp_path):
    async with serving(tmp_path, num_prompts=1) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await learner.want(1)
        await worker.work_off(1)
        message = await learner.receive()
        assert isinstance(message, NoBatch)
        assert message.step == 1
        await learner.want(1)
        assert isinstance(await learner.receive(), NoBatch)
        await server.finish()
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)]))
        await worker.ask(1)
        await worker.evaluate(await worker.take(EvalRequest))
        assert len(await evaluating) == 2


@asynchronous
async def test_the_wait_has_a_name(tmp_path):
    async with serving(tmp_path) as server:
        learner = FakeLearner(server)
        await server.begin()
        await learner.want(1)
        await until(lambda: server.status()["why_waiting"] == "no live worker", server)
        worker = FakeWorker(server)
        await worker.join()
        await worker.leases(2)
        assert server.status()["why_waiting"].startswith("rollout: 2 ")


# ---------------------------------------------------------------------------------------------------------- a whole run


async def work(worker, rng):
    """Answer whatever comes, sometimes twice."""
    await worker.join()
    await worker.ask(3)
    while True:
        lease = await worker.take(Lease)
        version = worker.version
        await worker.client.send(Started(lease_id=lease.lease_id, version=version))
        await asyncio.sleep(rng.random() / 100)
        accs = (1.0, 0.0) if rng.random() < 0.6 else (1.0, 1.0)
        for _ in range(rng.choice((1, 1, 2))):
            await worker.answer(lease, accs=accs, versions=((version, 4),))
        await worker.ask(1)


@pytest.mark.parametrize("run_ahead", [0.0, 1.0])
@asynchronous
async def test_a_run_of_two_workers_and_a_learner_is_sound(tmp_path, run_ahead):
    async with serving(tmp_path, run_ahead=run_ahead) as server:
        rng, learner, lines = random.Random(0), FakeLearner(server), []
        workers = [FakeWorker(server, index) for index in range(2)]
        tasks = [asyncio.create_task(work(worker, rng)) for worker in workers]
        await server.begin()
        for step in range(1, 9):
            await learner.want(step)
            batch = await learner.receive()
            assert len(batch.groups) == 2
            lines.append({"step": step, **await server.trained(step, {})})
            for worker in workers:
                worker.version = step
                await worker.client.send(Loaded(version=step, branch=0))
            await server.published(step)
        await server.finish()
        for task in tasks:
            task.cancel()
    write_files(tmp_path, lines)
    config = (tmp_path / "config.yaml").read_text().replace("run_ahead: 1.0", f"run_ahead: {run_ahead}")
    (tmp_path / "config.yaml").write_text(config)
    assert audit(tmp_path) == []
