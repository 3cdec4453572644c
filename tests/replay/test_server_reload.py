"""A replay server that is killed, and one that takes over its files and ports; and commands that come twice."""

import asyncio
import math

import pytest

from asyncdapo.errors import RunError
from asyncdapo.eval_messages import EvalRequest
from asyncdapo.messages import Ack, Lease, Welcome, Withdraw
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.replay.server.server import STATES
from asyncdapo.shares import NoBatch
from tests.asynchronous import asynchronous
from tests.replay.serving import TICK_S, FakeLearner, FakeWorker, eval_request, rows, serving, until
from tests.replay.small_run import write_files


def again(run_dir, server, **settings):
    """The next server of the same run, where the peers look for it."""
    return serving(run_dir, ports=server.ports, **settings)


@asynchronous
async def test_what_was_held_when_the_server_died_ends_exactly_once(tmp_path):
    """Its leases: two in a batch that was cut and taken, one whose acknowledgement is lost, one running, one whose
    message never arrived."""
    async with serving(tmp_path, run_ahead=1.0) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await worker.work_off(2)
        await learner.want(1)
        batch = await learner.receive()
        delivered, running = await worker.leases(2)
        await worker.answer(delivered)
        await until(lambda: server.status()["queued"] == 1, server)
        worker.passed_over.clear()
    async with again(tmp_path, server) as server:
        assert await worker.join() == Welcome(branch=0, granted=4)
        await server.begin()
        await worker.beat({delivered.lease_id: 8, running.lease_id: 3})
        assert await worker.take(Withdraw) == Withdraw(lease_ids=[delivered.lease_id])
        await worker.answer(delivered)
        assert await worker.take(Ack) == Ack(lease_id=delivered.lease_id)
        await worker.answer(running)
        assert await worker.take(Ack) == Ack(lease_id=running.lease_id)
        learner = FakeLearner(server, b"another life")
        await learner.want(1)
        assert await learner.receive() == batch
        lines = [{"step": 1, **await server.trained(1, {})}]
        await learner.want(2)
        assert [group.lease_id for group in (await learner.receive()).groups] == [
            delivered.lease_id,
            running.lease_id,
        ]
        lines.append({"step": 2, **await server.trained(2, {})})
        assert lines[-1]["replay/tokens_trained"] == 4 * 8
        assert lines[-1]["replay/duplicates"] == 1
        await server.finish()
    write_files(tmp_path, lines)
    assert audit(tmp_path) == []
    assert rows(tmp_path, "SELECT state, COUNT(*) FROM prompts GROUP BY state") == [("trained", 4)]


@pytest.mark.parametrize("lost_with", ["the connection", "the server"])
@asynchronous
async def test_a_lease_whose_message_was_lost_is_sent_again_and_counts_once(tmp_path, lost_with):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lost, _ = await worker.leases(2)
        worker.granted = 0  # as if neither had arrived
        if lost_with == "the connection":
            await find_again(tmp_path, worker, lost, numbers={1, 2})
    if lost_with == "the server":
        async with again(tmp_path, server) as server:
            assert await worker.join() == Welcome(branch=0, granted=0)
            await find_again(tmp_path, worker, lost, numbers={0})


async def find_again(tmp_path, worker, lost, numbers):
    for _ in range(2):
        await worker.beat()
    found = [await worker.take(Lease) for _ in range(2)]
    assert {lease.number for lease in found} == numbers
    [same] = [lease for lease in found if lease.lease_id == lost.lease_id]
    assert (same.prompt, same.seed, same.attempt) == (lost.prompt, lost.seed, lost.attempt)
    for _ in range(4):
        await worker.beat({lease.lease_id: 1 for lease in found})
    assert await worker.unread() == []
    await worker.answer(same)
    await worker.take(Ack)
    assert rows(tmp_path, "SELECT COUNT(*) FROM leases") == [(2,)]


@asynchronous
async def test_a_worker_that_does_not_come_back_after_a_reload_is_lost_with_its_leases(tmp_path):
    settings = {"heartbeat_s": TICK_S, "lease_stall_s": 1000 * TICK_S}
    async with serving(tmp_path, **settings) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        await worker.leases(2)
        worker.close()
    async with again(tmp_path, server, **settings) as server:
        assert server.status()["workers"] == 1
        await until(lambda: server.status()["workers"] == 0, server)
        assert rows(tmp_path, "SELECT COUNT(*) FROM leases WHERE outcome = 'lost'") == [(2,)]


@asynchronous
async def test_a_restarted_worker_after_a_reload_is_another_session(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        held = await worker.leases(2)
        worker.close()
    async with again(tmp_path, server) as server:
        await server.begin()
        new = FakeWorker(server, session="second")
        assert await new.join() == Welcome(branch=0, granted=0)
        assert rows(tmp_path, "SELECT COUNT(*) FROM leases WHERE outcome = 'lost'") == [(2,)]
        leases = await new.leases(4)
        assert held[0].prompt.prompt_id in [lease.prompt.prompt_id for lease in leases]


@asynchronous
async def test_peers_that_have_not_said_hello_to_the_new_server_are_strangers(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
    async with again(tmp_path, server) as server:
        await worker.answer(lease)
        await until(lambda: server.status()["dropped"]["strangers"] == 1, server)
        await worker.join()
        await worker.answer(lease)
        assert await worker.take(Ack) == Ack(lease_id=lease.lease_id)


# ---------------------------------------------------------------------------------------------------- repeated commands


@asynchronous
async def test_trained_published_and_finish_change_nothing_when_they_are_told_again(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await server.begin()
        await worker.work_off(2)
        await learner.want(1)
        await learner.receive()
        first = await server.trained(1, {"learner/loss": 0.5})
        told_again = await server.trained(1, {"learner/loss": 0.5})
        assert {name for name in first if str(told_again[name]) != str(first[name])} <= {
            "replay/cpu_s",
            *(f"replay/time/{state}_s" for state in (*STATES, "idle")),
        }
        for _ in range(2):
            await server.published(1)
            await server.covered(0)
    async with again(tmp_path, server) as server:
        told_again = await server.trained(1, {"learner/loss": 0.5})
        same = [name for name in first if name.startswith(("replay/tokens", "replay/staleness", "reward/filtered"))]
        assert {name: told_again[name] for name in same} == {name: first[name] for name in same}
        assert first.keys() - told_again.keys() <= {name for name in first if name.startswith("reward/metrics/")}
        await server.published(1)
        await server.finish()
        await server.finish()
    async with again(tmp_path, server) as server:
        await server.finish()
        learner = FakeLearner(server)
        await learner.want(2)
        assert await learner.receive() == NoBatch(step=2, reason="the run is over")
    assert rows(tmp_path, "SELECT COUNT(*) FROM batches") == [(1,)]
    assert rows(tmp_path, "SELECT version FROM publishes") == [(1,)]
    assert rows(tmp_path, "SELECT COUNT(*) FROM events WHERE kind = 'run_ended'") == [(1,)]


@asynchronous
async def test_a_step_whose_batch_was_never_cut_is_not_trained(tmp_path):
    async with serving(tmp_path) as server:
        with pytest.raises(RunError, match="batch 1 was never cut in branch 0"):
            await server.trained(1, {})


@asynchronous
async def test_an_evaluation_asked_for_twice_is_done_once_and_answered_twice(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        doomed, repeated = (asyncio.create_task(server.evaluate([eval_request(1), eval_request(2)])) for _ in range(2))
        await worker.ask(2)
        requests = [await worker.take(EvalRequest) for _ in range(2)]
        assert [request.number for request in requests] == [1, 2]
        doomed.cancel()
        for request in requests:
            await worker.evaluate(request)
        assert len(await repeated) == 4
        assert server.status()["evaluations_running"] == 0


@asynchronous
async def test_an_evaluation_under_which_the_server_died_is_asked_for_again(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await worker.ask(1)
        lost = asyncio.create_task(server.evaluate([eval_request(1)]))
        await worker.take(EvalRequest)
        lost.cancel()
    async with again(tmp_path, server) as server:
        repeated = asyncio.create_task(server.evaluate([eval_request(1)]))
        assert await worker.join() == Welcome(branch=0, granted=1)
        await worker.ask(1)
        request = await worker.take(EvalRequest)
        assert request.number == 2
        await worker.evaluate(request)
        assert len(await repeated) == 2


# ----------------------------------------------------------------------------------------------- pause and known deaths


@asynchronous
async def test_paused_nothing_is_leased_until_begin_whatever_was_asked_for(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        leases = await worker.leases(3)
        await worker.ask(3)
        await worker.take(Lease)  # run_ahead admits four
        await server.pause()
        await worker.answer(leases[0], accs=(1.0, 1.0))
        await worker.take(Ack)
        assert await worker.unread() == []
        await server.begin()
        await worker.take(Lease)


@asynchronous
async def test_the_leases_of_a_worker_whose_process_died_are_free_at_once(tmp_path):
    async with serving(tmp_path) as server:
        doomed, other = FakeWorker(server, 0), FakeWorker(server, 1)
        await doomed.join()
        await other.join()
        await server.begin()
        held = await doomed.leases(4)
        await server.lose_worker(0, "killed")
        await server.lose_worker(0, "killed")
        assert list(server.status()["known_workers"]) == [1]
        leases = await other.leases(4)
        assert {lease.prompt.prompt_id for lease in held} & {lease.prompt.prompt_id for lease in leases}
        await doomed.answer(held[0])
        await until(lambda: server.status()["dropped"]["strangers"] == 1, server)


@asynchronous
async def test_status_describes_every_known_worker(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server, 3)
        await worker.join()
        await server.begin()
        await worker.leases(2)
        await worker.beat(tokens=12.0)
        await worker.unread()
        status = server.status()
        assert list(status["known_workers"]) == [3]
        described = status["known_workers"][3]
        assert {what: number for what, number in described.items() if not math.isnan(number)} == {
            "joined": True,
            "loaded_version": 0,
            "branch": 0,
            "leases": 2,
            "silent_s": 0.0,
            "tokens": 12.0,
            "stalled": 0,
        }
        assert {"tokens_per_s", "running", "waiting"} < set(described), "they take several heartbeats"
        assert (status["branch"], status["filling_step"], status["ready"], status["sampled_tokens"]) == (0, 1, 0, 12.0)
