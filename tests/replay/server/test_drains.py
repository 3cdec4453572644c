"""A worker that is asked to leave gets nothing more; what it can't finish in time goes to others."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

from asyncdapo.eval_messages import EvalRequest
from asyncdapo.messages import Lease, Withdraw
from tests.asynchronous import asynchronous
from tests.replay.serving import FakeWorker, eval_request, serving, until


def rows(run_dir, query):
    with closing(sqlite3.connect(run_dir / "ledger.db")) as ledger:
        return ledger.execute(query).fetchall()


@asynchronous
async def test_a_drained_worker_finishes_what_it_holds_and_gets_nothing_more(tmp_path):
    async with serving(tmp_path) as server:
        leaver = FakeWorker(server, 0)
        await leaver.join()
        await server.begin()
        [lease] = await leaver.leases(1)
        draining = asyncio.create_task(server.drain_worker(0, 60.0, "scaled to 1"))
        await asyncio.sleep(0)
        await leaver.ask(3)
        await leaver.beat({lease.lease_id: 1})
        assert not any(isinstance(message, Lease) for message in await leaver.unread())
        assert not draining.done()
        await leaver.answer(lease)
        assert await draining == 0
        await leaver.beat()
        assert not any(isinstance(message, Lease) for message in await leaver.unread()), "it doesn't join again"
        assert server.status()["workers"] == 0
    assert rows(tmp_path, "SELECT kind, detail FROM events WHERE worker = 0")[1:] == [("worker_drained", "scaled to 1")]
    assert rows(tmp_path, "SELECT outcome FROM leases") == [("done",)]


@asynchronous
async def test_what_a_worker_cannot_finish_in_time_goes_to_another_and_costs_no_attempt(tmp_path):
    async with serving(tmp_path) as server:
        leaver, other = FakeWorker(server, 0), FakeWorker(server, 1)
        await leaver.join()
        await other.join()
        await server.begin()
        held = await leaver.leases(2)
        assert await server.drain_worker(0, 0.0, "SIGTERM") == 2
        assert (await leaver.take(Withdraw)).lease_ids == [held[0].lease_id]
        again = await other.leases(4)
        prompts = {lease.prompt.prompt_id: lease.attempt for lease in again}
        assert [prompts[lease.prompt.prompt_id] for lease in held] == [1, 1]
        await server.lose_worker(0, "it has left")
        assert list(server.status()["known_workers"]) == [1]
    drained = "SELECT outcome, reason FROM leases WHERE worker = 0"
    assert rows(tmp_path, drained) == [("withdrawn", "drained")] * 2
    kinds = rows(tmp_path, "SELECT kind FROM events WHERE worker = 0 AND lease_id IS NULL")
    assert kinds == [("worker_joined",), ("worker_drained",)], "it is not lost as well"


@asynchronous
async def test_a_worker_that_dies_while_it_is_drained_is_lost(tmp_path):
    async with serving(tmp_path) as server:
        leaver = FakeWorker(server, 0)
        await leaver.join()
        await server.begin()
        await leaver.leases(1)
        draining = asyncio.create_task(server.drain_worker(0, 60.0, "SIGTERM"))
        await asyncio.sleep(0)
        await server.lose_worker(0, "killed")
        await FakeWorker(server, 1).join()
        assert await draining == 0
    assert rows(tmp_path, "SELECT outcome FROM leases") == [("lost",)]
    assert ("worker_lost", "killed") in rows(tmp_path, "SELECT kind, detail FROM events")


@asynchronous
async def test_an_evaluation_request_of_a_drained_worker_is_finished_or_given_to_another(tmp_path):
    async with serving(tmp_path) as server:
        leaver, other = FakeWorker(server, 0), FakeWorker(server, 1)
        await leaver.join()
        await leaver.ask(1)
        evaluating = asyncio.create_task(server.evaluate([eval_request(1), eval_request(2)]))
        first = await leaver.take(EvalRequest)
        draining = asyncio.create_task(server.drain_worker(0, 60.0, "SIGTERM"))
        await asyncio.sleep(0)
        await leaver.evaluate(first)
        assert await draining == 0
        await other.join()
        await other.ask(1)
        await other.evaluate(await other.take(EvalRequest))
        assert len(await evaluating) == 4


@asynchronous
async def test_a_process_that_takes_the_place_of_one_that_left_joins(tmp_path):
    async with serving(tmp_path) as server:
        await FakeWorker(server, 0).join()
        assert await server.drain_worker(0, 0.0, "SIGTERM") == 0
        await server.lose_worker(0, "it has left")
        again = FakeWorker(server, 0, session="second")
        await again.join()
        await until(lambda: server.status()["workers"] == 1, server)
