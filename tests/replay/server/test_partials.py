"""What is sampled of a group that isn't complete is kept, and goes to the prompt's next lease as it was saved."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import msgspec
import numpy as np

from asyncdapo.messages import Ack, Lease, Recall, Withdraw
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.replay.ledger.ledger import describe_unreadable
from asyncdapo.replay.server.accounts import in_flight
from asyncdapo.transport.payload import PartialGroup
from tests.asynchronous import asynchronous
from tests.replay.serving import FakeLearner, FakeWorker, rows, serving, until
from tests.replay.small_run import write_files

SAMPLED = [([(0, 5)], "stop"), ([(0, 2), (0, 1)], None)]
NUM_TOKENS = 8
UNREADABLE = "SELECT prompt_id, number FROM events WHERE kind = 'partial_dropped' AND detail = 'unreadable'"
CONTINUED = "SELECT lease_id, prompt_id, number FROM events WHERE kind = 'continued'"


def read(frames):
    header, tokens, logprobs = frames
    group = msgspec.msgpack.decode(header, type=PartialGroup)
    found = [(completion.versions, completion.finish_reason) for completion in group.completions]
    return found, np.frombuffer(tokens, "<i4").tolist(), np.frombuffer(logprobs, "<f4").tolist()


async def hold(server, worker, num=1):
    """So many leases, each with some tokens."""
    await worker.join()
    await server.begin()
    leases = await worker.leases(num)
    await worker.beat({lease.lease_id: NUM_TOKENS for lease in leases}, tokens=num * NUM_TOKENS, started_version=0)
    return leases


@asynchronous
async def test_what_a_drained_worker_hands_back_another_one_continues(tmp_path):
    async with serving(tmp_path) as server:
        leaver, other = (FakeWorker(server, index, continues=True) for index in (0, 1))
        [lease] = await hold(server, leaver)
        draining = asyncio.create_task(server.drain_worker(0, 0.0, "SIGTERM"))
        assert (await leaver.take(Recall)).lease_ids == [lease.lease_id]
        await leaver.save(lease.lease_id, SAMPLED, handed_back=True)
        assert (await leaver.take(Withdraw)).lease_ids == [lease.lease_id]
        assert await draining == 1
        await other.join()
        [again] = await other.leases(1)
        assert (again.prompt, again.seed, again.attempt) == (lease.prompt, lease.seed, 1)
        assert read(other.begun[again.lease_id]) == (SAMPLED, list(range(NUM_TOKENS)), [-0.25] * NUM_TOKENS)
    assert rows(tmp_path, "SELECT outcome, reason FROM leases WHERE worker = 0") == [("withdrawn", "handed back")]
    assert rows(tmp_path, CONTINUED) == [(again.lease_id, lease.prompt.prompt_id, NUM_TOKENS)]


@asynchronous
async def test_every_saved_token_is_counted_once_until_its_batch_is_trained(tmp_path):
    async with serving(tmp_path) as server:
        leaver, other, learner = FakeWorker(server, 0, continues=True), FakeWorker(server, 1), FakeLearner(server)
        other.continues = True
        first, second = await hold(server, leaver, 2)
        recalling = asyncio.create_task(server.recall())
        await leaver.take(Recall)
        await leaver.save(first.lease_id, SAMPLED, handed_back=True)
        await leaver.save(second.lease_id, SAMPLED, handed_back=True)
        await recalling
        assert server._dispatch.state.leases.num_partial_tokens == 2 * NUM_TOKENS
        await server.lose_worker(0, "gone")
        await other.join()
        await server.begin()
        leases = await other.leases(2)
        assert server._dispatch.state.leases.num_partial_tokens == 0
        for lease in leases:  # 16 tokens each, of which 8 were sampled before
            await other.answer(lease, versions=((0, 8),))
            await other.take(Ack)
        await other.beat(tokens=2.0 * (16 - NUM_TOKENS))
        await learner.want(1)
        await learner.receive()
        line = {"step": 1, **await server.trained(1, {})}
        await server.published(1)
    assert (line["rollout/tokens"], line["replay/tokens_trained"]) == (32, 32)
    assert (line["replay/continued_leases"], line["replay/continued_tokens"]) == (2, 16)
    assert in_flight(line) == 0
    write_files(tmp_path, [line])
    assert audit(tmp_path) == []


@asynchronous
async def test_a_worker_that_dies_loses_what_it_has_not_saved(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server, 0, continues=True)
        [lease] = await hold(server, worker)
        await worker.save(lease.lease_id, SAMPLED)
        await worker.beat({lease.lease_id: NUM_TOKENS + 7}, tokens=NUM_TOKENS + 7.0)
        await worker.unread()
        await server.lose_worker(0, "killed")
        assert server._dispatch.state.leases.num_partial_tokens == NUM_TOKENS
        assert server._dispatch.accounts._ungrouped["lost"] == 7


@asynchronous
async def test_what_is_saved_outlives_the_server_and_a_rollback_that_keeps_its_versions(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server, 0, continues=True)
        [lease] = await hold(server, worker)
        await worker.save(lease.lease_id, SAMPLED)
        await worker.unread()
    for life, num_before in (("killed", 2), ("rolled back", 0)):  # the prompt of a lost lease goes behind others
        async with serving(tmp_path, heartbeat_s=0.2) as server:
            if life == "rolled back":
                assert await server.roll_back(0, "resumed") == 1
            worker = FakeWorker(server, 0, life, continues=True)
            worker.branch = server.branch
            await worker.join()
            await server.begin()
            *_, lease = await worker.leases(num_before + 1)
            assert lease.prompt.prompt_id == 0
            assert read(worker.begun[lease.lease_id])[0] == SAMPLED


ALTERED = {
    0: "token_ids = ZEROBLOB(32)",
    1: "logprobs = SUBSTR(logprobs, 1, 31)",
    2: "completions = SUBSTR(completions, 2)",
    3: "lease_id = lease_id - 1",
}
"""What happens to the row of each of these prompts."""


def alter(run_dir):
    with closing(sqlite3.connect(run_dir / "ledger.db")) as ledger, ledger:
        for prompt_id, change in ALTERED.items():
            ledger.execute(f"UPDATE partials SET {change} WHERE prompt_id = ?", (prompt_id,))


@asynchronous
async def test_saved_rows_that_were_altered_are_named_and_left_out_by_a_rollback(tmp_path):
    async with serving(tmp_path, prompts_per_step=4) as server:
        worker = FakeWorker(server, 0, continues=True)
        for lease in await hold(server, worker, len(ALTERED) + 1):
            await worker.save(lease.lease_id, SAMPLED)
        await worker.unread()
    alter(tmp_path)
    async with serving(tmp_path, heartbeat_s=0.05) as server:
        await server.roll_back(0, "resumed")
        said = describe_unreadable(tmp_path, server.branch)
    assert said.startswith("4 groups can't be read back, their prompts are sampled again: a half-sampled one (what is")
    assert "of prompt 0 in `partials`: its checksum is another one" in said
    assert said.endswith("and 1 more")
    assert "of prompt 1 in `partials`: frames of [32, 31] bytes for 8 tokens" in said
    assert rows(tmp_path, "SELECT prompt_id FROM partials") == [(len(ALTERED),)]
    assert rows(tmp_path, UNREADABLE) == [(prompt_id, NUM_TOKENS) for prompt_id in ALTERED]
    assert rows(tmp_path, "SELECT DISTINCT state FROM prompts WHERE prompt_id <= 4") == [("waiting",)]


@asynchronous
async def test_rows_that_are_altered_while_the_run_lives_are_named_and_their_groups_begin_anew(tmp_path):
    num = len(ALTERED)
    async with serving(tmp_path) as server:
        leaver, other = (FakeWorker(server, index, continues=True) for index in (0, 1))
        for lease in await hold(server, leaver, num):
            await leaver.save(lease.lease_id, SAMPLED, handed_back=True)
            await leaver.take(Withdraw)
        await server.lose_worker(0, "it has left")
        alter(tmp_path)
        await other.join()
        leases = await other.leases(num)
        assert [other.begun[lease.lease_id] for lease in leases] == [[]] * num
        for lease in leases:  # 16 tokens each, and none of those before
            await other.answer(lease, versions=((0, 8),))
            await other.take(Ack)
        await other.beat(tokens=16.0 * num)
        learner = FakeLearner(server)
        await learner.want(1)
        await learner.receive()
        line = {"step": 1, **await server.trained(1, {})}
    assert rows(tmp_path, UNREADABLE) == [(prompt_id, NUM_TOKENS) for prompt_id in ALTERED]
    (named, count), *_ = rows(tmp_path, "SELECT MAX(detail), COUNT(*) FROM events WHERE kind = 'unreadable'")
    assert named.startswith("what is saved of prompt 3 in `partials`: its columns")
    assert count == num
    assert (line["replay/tokens_dropped"], line["replay/continued_leases"]) == (num * NUM_TOKENS, 0)
    assert in_flight(line) == 0


@asynchronous
async def test_a_worker_that_cannot_continue_begins_anew_and_the_ledger_says_so(tmp_path):
    async with serving(tmp_path) as server:
        leaver, other = FakeWorker(server, 0, continues=True), FakeWorker(server, 1)
        [lease] = await hold(server, leaver)
        await leaver.save(lease.lease_id, SAMPLED, handed_back=True)
        await leaver.take(Withdraw)
        await server.lose_worker(0, "it has left")
        await other.join()
        [again] = await other.leases(1)
        assert again.prompt == lease.prompt
        assert other.begun[again.lease_id] == []
    dropped = "SELECT prompt_id, number, detail FROM events WHERE kind = 'partial_dropped'"
    assert rows(tmp_path, dropped) == [(0, NUM_TOKENS, "worker 1 can't continue it")]


@asynchronous
async def test_a_save_that_is_damaged_or_of_a_lease_that_is_over_changes_nothing(tmp_path):
    async with serving(tmp_path, server_settings={"vocab_size": NUM_TOKENS}) as server:
        worker = FakeWorker(server, 0, continues=True)
        [lease] = await hold(server, worker)
        await worker.save(lease.lease_id, SAMPLED)
        for damaged in (
            SAMPLED[:1],
            [([(0, 3)], None), ([(9, 3)], None)],
            [([(0, 3)], None), ([], "stop")],
            [([(0, 3)], None), ([(0, 0)], None)],
            [([(0, 6)], None), ([(0, 6)], None)],
        ):
            await worker.save(lease.lease_id, damaged)
        await worker.save(lease.lease_id + 9, SAMPLED)
        assert (await worker.take(Withdraw)).lease_ids == [lease.lease_id + 9]
        assert server._arrivals.dropped["rejected"] == 5
        assert read(server._journal.read_partial(0, lease.lease_id + 1))[0] == SAMPLED
        assert server.status()["running"] == 1


@asynchronous
async def test_a_recall_that_is_not_followed_is_said_again_and_given_up(tmp_path):
    async with serving(tmp_path, heartbeat_s=0.05) as server:
        worker = FakeWorker(server, 0, continues=True)
        [lease] = await hold(server, worker)
        recalling = asyncio.create_task(server.recall())
        assert [(await worker.take(Recall)).lease_ids for _ in range(2)] == [[lease.lease_id]] * 2
        await until(recalling.done, server)
        assert not any(isinstance(message, Lease) for message in await worker.unread()), "nothing is granted any more"
        assert server.status()["running"] == 1


@asynchronous
async def test_a_recall_waits_for_no_worker_that_misses_heartbeats(tmp_path):
    async with serving(tmp_path, heartbeat_s=10.0) as server:
        await hold(server, FakeWorker(server, 0, continues=True))
        recalling = asyncio.create_task(server.recall())
        await asyncio.sleep(0.05)
        assert not recalling.done()
        for _ in range(3):
            server._workers.tick()
        await recalling
        assert server.status()["running"] == 1
