"""A rollback during a run: the learner came back with an older checkpoint, workers and server stayed."""

import asyncio

from asyncdapo.eval_messages import EvalRequest
from asyncdapo.messages import Ack, Lease, Loaded, Withdraw
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.replay.server.sessions import DESERTED_TICKS
from tests.asynchronous import asynchronous
from tests.replay.serving import TICK_S, FakeLearner, FakeWorker, eval_request, rows, serving, until
from tests.replay.small_run import write_files


async def train(server, worker, learner, step):
    """Fill, train and publish batch `step`, sampled by the version before it. Returns the batch and the line."""
    await worker.load(step - 1, server.branch)
    await learner.want(step)
    # no more than a batch: the question travels on a socket of its own, and what is ahead of it must not fill replay
    while server.status()["filling_step"] == step and server.status()["ready"] < 2:
        await worker.work_off(1, versions=((step - 1, 4),))
    batch = await learner.receive()
    line = {"step": step, **await server.trained(step, {})}
    await server.published(step)
    return batch, line


@asynchronous
async def test_the_run_resumes_from_the_checkpoint_in_a_new_branch(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        _, first = await train(server, worker, learner, 1)
        second, _ = await train(server, worker, learner, 2)
        await train(server, worker, learner, 3)
        await worker.load(3, 0)
        [delivered, running] = await worker.leases(2)
        worker.passed_over.clear()
        await worker.answer(delivered, versions=((3, 4),))
        await worker.take(Ack)
        await worker.beat({running.lease_id: 5}, tokens=100.0)

        await worker.unread()
        assert await server.roll_back(1, "the learner died") == 1
        assert await worker.take(Withdraw) == Withdraw(lease_ids=[running.lease_id])

        # late groups of undone leases are acknowledged and dropped, and nothing is sampled with undone weights
        await worker.answer(running, versions=((3, 4),))
        assert await worker.take(Ack) == Ack(lease_id=running.lease_id)
        await worker.ask(4)
        await worker.beat()
        await worker.client.send(Loaded(version=1, branch=0))
        assert (await worker.join()).branch == 1
        assert worker.passed_over == []
        assert server.status()["workers"] == 0
        assert "workers [0] have no weights of branch 1 yet" in server.status()["why_waiting"]

        # the batch that had been cut is the same, for another learner
        learner = FakeLearner(server, b"another life")
        await learner.want(2)
        restored = await learner.receive()
        assert restored.branch == 1
        assert restored.groups == second.groups
        line = await server.trained(2, {})
        assert line["replay/tokens_trained"] == 4 * 8

        # a worker with weights of the new branch works, for prompts that were in flight before others
        await worker.load(1, 1)
        lease = await worker.take(Lease)
        assert (lease.branch, lease.lease_id > running.lease_id) == (1, True)
        assert lease.prompt.prompt_id in {running.prompt.prompt_id, delivered.prompt.prompt_id}
        await worker.answer(lease, versions=((1, 4),))
        await worker.take(Ack)
        await server.published(2)
        _, third = await train(server, worker, learner, 3)
        await server.finish()
    write_files(tmp_path, [first, {"step": 2, **line}, third])
    assert audit(tmp_path) == []
    undone = rows(tmp_path, "SELECT SUM(tokens) FROM undone_groups")[0][0]
    assert third["replay/tokens_undone"] == undone + 5


@asynchronous
async def test_every_token_of_the_ledger_is_accounted_for_over_a_rollback_and_a_reload(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await train(server, worker, learner, 1)
        await worker.work_off(1, accs=(1.0, 1.0))
        await train(server, worker, learner, 2)
        await server.roll_back(1, "test")
        await worker.load(1, 1)
        learner.close()
        learner = FakeLearner(server, b"second")
        _, line = await train(server, worker, learner, 2)
        held = server.status()["queued"]
    num_groups = rows(tmp_path, "SELECT (SELECT COUNT(*) FROM groups) + (SELECT COUNT(*) FROM undone_groups)")[0][0]
    ends = {name: number for name, number in line.items() if name.startswith("replay/tokens_")}
    assert ends.pop("replay/tokens_in_flight") == 0
    assert ends["replay/tokens_held"] == 8 * held
    assert sum(ends.values()) == 8 * num_groups == line["rollout/tokens"]
    async with serving(tmp_path, ports=server.ports, server_settings={"totals": line}) as server:
        again = await server.trained(2, {})
    assert {name: again[name] for name in ends} == ends


@asynchronous
async def test_a_running_evaluation_is_asked_anew_of_the_weights_that_count(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        evaluating = asyncio.create_task(server.evaluate([eval_request(1), eval_request(2)]))
        await worker.ask(2)
        first, second = await worker.take(EvalRequest), await worker.take(EvalRequest)
        await worker.evaluate(first, acc=0.0)
        await worker.unread()
        await server.roll_back(0, "test")
        await worker.evaluate(second, acc=0.0)
        await worker.ask(2)
        assert not any(isinstance(message, EvalRequest) for message in await worker.unread())
        await worker.load(0, 1)
        for _ in range(2):
            await worker.evaluate(await worker.take(EvalRequest), acc=1.0)
        assert [answer.acc for answer in await evaluating] == [1.0] * 4


@asynchronous
async def test_workers_that_wait_for_weights_are_not_missed_and_do_not_end_the_run(tmp_path):
    async with serving(tmp_path, heartbeat_s=TICK_S, lease_stall_s=1000 * TICK_S) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        await server.roll_back(0, "test")
        for _ in range(DESERTED_TICKS + 5):
            await worker.beat()
            await asyncio.sleep(TICK_S)
        assert not server.serving.done()
        await worker.load(0, 1)
        await worker.leases(1)


@asynchronous
async def test_messages_of_the_old_branch_that_come_late_change_nothing(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await train(server, worker, learner, 1)
        await server.roll_back(0, "test")
        await worker.load(0, 1)
        await until(lambda: server.status()["workers"] == 1, server)
        await worker.client.send(Loaded(version=1, branch=0))
        await worker.unread()
        assert server.status()["known_workers"][0]["joined"]
        assert rows(tmp_path, "SELECT version, branch FROM loads") == [(0, 1)]


@asynchronous
async def test_a_rollback_that_is_told_again_begins_one_more_branch_with_the_same_batches(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await train(server, worker, learner, 1)
        second, _ = await train(server, worker, learner, 2)
        assert await server.roll_back(1, "test") == 1
        assert await server.roll_back(1, "again") == 2
        learner = FakeLearner(server, b"second")
        await learner.want(2)
        assert (await learner.receive()).groups == second.groups
