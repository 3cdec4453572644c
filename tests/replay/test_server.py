"""The replay server over real sockets: workers, the learner, and whatever else may knock."""

import asyncio
import random
from contextlib import closing, contextmanager

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from asyncdapo.errors import RunError
from asyncdapo.messages import (
    Ack,
    EvalAck,
    EvalRequest,
    GroupDone,
    GroupFailed,
    Lease,
    Loaded,
    NoBatch,
    Payload,
    Reject,
    Sampling,
    Started,
    Welcome,
    Withdraw,
    sample_seed,
)
from asyncdapo.replay import events as core
from asyncdapo.replay.audit import audit
from asyncdapo.replay.config import FilterConfig
from asyncdapo.replay.journal import Journal, open_ledger
from asyncdapo.transport.codec import encode
from tests.replay.serving import FakeLearner, FakeWorker, scenario, serving
from tests.replay.small_run import make_group, prompt_at, write_files

TICK_S = 0.03
"""Heartbeat interval of tests in which time matters: a worker is lost after 15 of them."""


def rows(run_dir, query):
    with closing(open_ledger(run_dir)) as ledger:
        return [tuple(row) for row in ledger.execute(query)]


async def until(true, server):
    """Wait for what the server does by itself; its failure ends the wait."""
    while not true():
        assert not server.serving.done(), server.serving.exception()
        await asyncio.sleep(0.005)


def eval_request(request_id, num_prompts=2):
    prompts = [prompt_at(1000 * request_id + i) for i in range(num_prompts)]
    return EvalRequest(request_id=request_id, seed=1, sampling=Sampling(), prompts=prompts)


# -------------------------------------------------------------------------------------------------------------- leases


@scenario
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


@scenario
async def test_a_repeated_ask_is_owed_nothing_more(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        await worker.leases(2)
        await worker.ask(0)
        await worker.beat()
        assert await worker.unread() == []


@scenario
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
def test_a_worker_of_another_schema_or_with_weights_of_another_run_is_not_welcome(tmp_path, hello):
    async def run():
        async with serving(tmp_path) as server:
            stranger = FakeWorker(server)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stranger.join(**hello), 0.2)
            assert server.status()["workers"] == 0
            assert server.status()["dropped"]["malformed"] == 1

    asyncio.run(run())


@scenario
async def test_started_and_loaded_reach_the_ledger(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        await worker.client.send(Started(lease_id=lease.lease_id, version=0))
        await worker.client.send(Loaded(version=7))
        await worker.client.send(Started(lease_id=lease.lease_id, version=7))
        await worker.unread()
        assert rows(tmp_path, f"SELECT started_version FROM leases WHERE lease_id = {lease.lease_id}") == [(0,)]
        assert rows(tmp_path, "SELECT version FROM loads") == [(0,)]


# -------------------------------------------------------------------------------------------------------------- groups


@scenario
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
        if isinstance(event, core.GroupDone):
            raise OSError("no space left on device")
        super().write(event, actions, **facts)


@scenario
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


@scenario
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


@scenario
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


@scenario
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


def with_completion(group, **changes):
    """The group with its first completion changed."""
    first, *rest = group.completions
    return msgspec.structs.replace(group, completions=[msgspec.structs.replace(first, **changes), *rest])


def with_logprob(payload, value):
    logprobs = payload.logprobs.copy()
    logprobs[3] = value
    return Payload(payload.prompt_ids, payload.token_ids, logprobs)


BAD_GROUPS = {
    "another prompt": lambda g, p: (msgspec.structs.replace(g, prompt_id=5), p),
    "another attempt": lambda g, p: (msgspec.structs.replace(g, attempt=2), p),
    "another branch": lambda g, p: (msgspec.structs.replace(g, branch=1), p),
    "another worker": lambda g, p: (msgspec.structs.replace(g, worker=3), p),
    "one completion": lambda g, p: (msgspec.structs.replace(g, completions=g.completions[:1]), p),
    "no completion": lambda g, p: (msgspec.structs.replace(g, completions=[]), p),
    "an empty completion": lambda g, p: (with_completion(g, num_tokens=0, versions=[], loss_mask=[]), p),
    "versions too short": lambda g, p: (with_completion(g, versions=[(0, 3)]), p),
    "a negative run": lambda g, p: (with_completion(g, versions=[(0, 5), (0, -1)]), p),
    "a mask too long": lambda g, p: (with_completion(g, loss_mask=[(1, 5)]), p),
    "a mask of 2": lambda g, p: (with_completion(g, loss_mask=[(2, 4)]), p),
    "weights of the future": lambda g, p: (with_completion(g, versions=[(1, 4)]), p),
    "a negative version": lambda g, p: (with_completion(g, versions=[(-1, 4)]), p),
    "a reward that is no number": lambda g, p: (with_completion(g, reward=float("nan")), p),
    "a metric that is no number": lambda g, p: (with_completion(g, metrics={"acc": float("inf")}), p),
    "a time that is no number": lambda g, p: (msgspec.structs.replace(g, generate_s=float("nan")), p),
    "a log-prob that is no number": lambda g, p: (g, with_logprob(p, np.nan)),
    "a log-prob above 0": lambda g, p: (g, with_logprob(p, 0.5)),
    "an infinite log-prob": lambda g, p: (g, with_logprob(p, -np.inf)),
    "a negative token": lambda g, p: (g, Payload(p.prompt_ids, -1 - p.token_ids, p.logprobs)),
    "other prompt tokens": lambda g, p: (g, Payload(p.prompt_ids + 1, p.token_ids, p.logprobs)),
    "a token too few": lambda g, p: (g, Payload(p.prompt_ids, p.token_ids[:-1], p.logprobs)),
}


@pytest.mark.parametrize("what", BAD_GROUPS)
def test_a_group_that_contradicts_itself_or_its_lease_is_rejected(tmp_path, what):
    async def run():
        async with serving(tmp_path) as server:
            worker = FakeWorker(server)
            await worker.join()
            await server.begin()
            lease, _ = await worker.leases(2)
            await worker.send_group(*BAD_GROUPS[what](*make_group(lease)))
            reject = await worker.take(Reject)
            assert reject.lease_id == lease.lease_id
            assert rows(tmp_path, "SELECT lease_id, detail FROM events WHERE kind = 'rejected'") == [
                (lease.lease_id, reject.reason)
            ]
            assert rows(tmp_path, "SELECT state, attempts FROM prompts WHERE prompt_id = 0")[0][1] == 1
            assert rows(tmp_path, "SELECT COUNT(*) FROM groups") == [(0,)]

    asyncio.run(asyncio.wait_for(run(), 20))


@scenario
async def test_a_group_with_two_frames_is_rejected(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        group, payload = make_group(lease)
        await worker.client.send(GroupDone(group=group), payload.frames()[:2])
        assert (await worker.take(Reject)).lease_id == lease.lease_id


@scenario
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


@scenario
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


# ------------------------------------------------------------------------------------------------ loss and coming back


@scenario
async def test_a_new_session_loses_the_old_ones_leases_and_their_prompts_come_again(tmp_path):
    async with serving(tmp_path) as server:
        old = FakeWorker(server, session="old")
        await old.join()
        await server.begin()
        lost = await old.leases(4)
        old.close()
        new = FakeWorker(server, session="new")
        assert await new.join() == Welcome(branch=0, granted=0)
        again = await new.leases(4)
        assert {lease.lease_id for lease in lost}.isdisjoint(lease.lease_id for lease in again)
        seconds = {lease.prompt.prompt_id for lease in again if lease.attempt == 2}
        assert seconds
        assert seconds <= {lease.prompt.prompt_id for lease in lost}
        assert rows(tmp_path, "SELECT COUNT(*) FROM leases WHERE outcome = 'lost' AND session = 'old'") == [(4,)]


@scenario
async def test_a_silent_worker_is_lost_and_one_that_speaks_again_works_again(tmp_path):
    async with serving(tmp_path, heartbeat_s=TICK_S) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        await until(lambda: server.status()["suspected_workers"] == [0], server)
        assert "nothing heard for long from workers [0]" in server.status()["why_waiting"]
        await until(lambda: server.status()["workers"] == 0, server)
        assert server.status()["why_waiting"].startswith(("no live worker", "learner"))
        await worker.ask(1)
        await worker.beat({lease.lease_id: 5})
        assert lease.lease_id in (await worker.take(Withdraw)).lease_ids
        assert (await worker.take(Lease)).lease_id > lease.lease_id
        assert server.status()["workers"] == 1


@scenario
async def test_a_lease_without_progress_is_lost_and_one_with_progress_is_not(tmp_path):
    async with serving(tmp_path, heartbeat_s=TICK_S, lease_stall_s=10 * TICK_S) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        alive, stalled = await worker.leases(2)
        beats = asyncio.create_task(beat_for_ever(worker, alive, stalled))
        withdrawn = await worker.take(Withdraw)
        beats.cancel()
        assert withdrawn == Withdraw(lease_ids=[stalled.lease_id])
        lost = rows(tmp_path, "SELECT lease_id, reason FROM leases WHERE outcome = 'lost'")
        assert lost == [(stalled.lease_id, "stalled")]


async def beat_for_ever(worker, alive, stalled):
    for num_tokens in range(1, 10**6):
        await worker.beat({alive.lease_id: num_tokens, stalled.lease_id: 1})
        await asyncio.sleep(TICK_S / 2)


@scenario
async def test_a_heartbeat_that_reports_a_lease_that_is_over_is_told_so(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await worker.beat({41: 3, 42: 3})
        assert await worker.take(Withdraw) == Withdraw(lease_ids=[41, 42])


# ------------------------------------------------------------------------------------------------- strangers and noise


@scenario
async def test_strangers_are_dropped_in_silence_and_counted(tmp_path):
    async with serving(tmp_path) as server:
        stranger, worker = FakeWorker(server, 5), FakeWorker(server)
        await server.begin()
        await worker.join()
        await stranger.ask(3)
        await stranger.beat()
        lease, _ = await worker.leases(2)
        await stranger.answer(lease)
        await until(lambda: server.status()["dropped"]["strangers"] == 3, server)
        assert rows(tmp_path, "SELECT worker FROM leases") == [(0,), (0,)]
        await worker.answer(lease)
        await worker.take(Ack)


@contextmanager
def raw_peer(address, identity):
    """A socket that sends whatever it is given."""
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.IDENTITY, identity)
    socket.connect(address)
    try:
        yield socket
    finally:
        socket.close()


class Noise:
    """Real messages with bytes flipped, cut off, repeated or swapped."""

    def __init__(self, messages, seed):
        self.messages, self.random = messages, random.Random(seed)

    def frames(self):
        frames = [bytearray(frame) for frame in self.random.choice(self.messages)]
        for _ in range(self.random.randint(1, 3)):
            self._mutate(frames)
        return [bytes(frame) for frame in frames]

    def _mutate(self, frames):
        frame = self.random.choice(frames)
        match self.random.randrange(5):
            case 0 if frame:
                frame[self.random.randrange(len(frame))] ^= 1 << self.random.randrange(8)
            case 1 if frame:
                del frame[self.random.randrange(len(frame)) :]
            case 2:
                frame.extend(self.random.randbytes(4))
            case 3:
                frames.append(bytearray(self.random.randbytes(self.random.randrange(8))))
            case 4:
                self.random.shuffle(frames)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_frames_of_a_known_worker_neither_end_nor_confuse_the_server(tmp_path, seed):
    async def run():
        async with serving(tmp_path) as server:
            noisy, worker = FakeWorker(server, 1), FakeWorker(server, 0)
            await noisy.join()
            await worker.join()
            await server.begin()
            leases = await noisy.leases(2)
            noisy.close()
            groups = [make_group(lease, worker=1) for lease in leases]
            messages = [encode(GroupDone(group=group), payload.frames()) for group, payload in groups]
            messages += [encode(Started(lease_id=leases[0].lease_id, version=0)), encode(Loaded(version=0))]
            messages += [encode(GroupFailed(lease_id=leases[1].lease_id, reason="x"))]
            noise = Noise(messages, seed)
            with raw_peer(server.rollout_address, b"rollout-1-first") as socket:
                for _ in range(400):
                    await socket.send_multipart(noise.frames())
                await socket.send_multipart(encode(noisy.hello()))
                while b"Welcome" not in (await socket.recv_multipart())[0]:
                    continue
            [lease, *_] = await worker.leases(2)
            await worker.answer(lease)
            await worker.take(Ack)
            dropped = server.status()["dropped"]
            assert dropped["malformed"] > 50
            assert dropped["rejected"] > 0
            await server.finish()
        write_files(tmp_path, [])
        assert audit(tmp_path) == ["there is a batch: batches 0"]

    asyncio.run(asyncio.wait_for(run(), 20))


@scenario
async def test_noise_on_the_learners_socket_is_dropped(tmp_path):
    async with serving(tmp_path) as server:
        learner = FakeLearner(server)
        with raw_peer(server.learner_address, b"noise") as socket:
            await socket.send_multipart([b"\xc1 noise"])
            await learner.want(99)
            await until(lambda: server.status()["dropped"]["malformed"] == 2, server)


# ------------------------------------------------------------------------------------------------------------- learner


async def answer_all(worker, num, **group):
    """Answer so many leases; returns them."""
    leases = await worker.leases(num)
    for lease in leases:
        await worker.answer(lease, **group)
        await worker.take(Ack)
    return leases


@scenario
async def test_the_learner_gets_its_batch_when_it_is_full_after_the_ledger_has_the_cut(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await learner.want(1)
        leases = await worker.leases(3)
        for lease in reversed(leases):
            await worker.answer(lease)
        batch, frames = await learner.receive()
        assert rows(tmp_path, "SELECT group_id FROM groups WHERE state = 'cut' AND step = 1 ORDER BY prompt_id") == [
            (group.lease_id,) for group in batch.groups
        ]
        assert (batch.step, batch.max_staleness) == (1, 1)
        prompts = [group.prompt_id for group in batch.groups]
        assert prompts == sorted(prompts)
        parts = Payload.from_frames(frames, batch.groups).split(batch.groups)
        by_id = {lease.lease_id: lease for lease in leases}
        for group, part in zip(batch.groups, parts, strict=True):
            expected, payload = make_group(by_id[group.lease_id])
            assert group == expected
            assert part.frames() == payload.frames()


@scenario
async def test_a_batch_is_the_same_however_often_and_by_whom_it_is_wanted(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await answer_all(worker, 3)
        await learner.want(1)
        first, frames = await learner.receive()
        learner.close()
        restarted = FakeLearner(server, b"restarted")
        for _ in range(2):
            await restarted.want(1)
            again, frames_again = await restarted.receive()
            assert again == first
            assert [bytes(frame) for frame in frames_again] == [bytes(frame) for frame in frames]


@scenario
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


@scenario
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


@scenario
async def test_when_the_data_is_used_up_the_learner_is_told_and_evaluation_goes_on(tmp_path):
    async with serving(tmp_path, num_prompts=1) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await learner.want(1)
        await answer_all(worker, 1)
        message, _ = await learner.receive()
        assert isinstance(message, NoBatch)
        assert message.step == 1
        await learner.want(1)
        assert isinstance((await learner.receive())[0], NoBatch)
        await server.finish()
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)], share=1.0))
        await worker.ask(1)
        await worker.evaluate(await worker.take(EvalRequest))
        assert len(await evaluating) == 2


@scenario
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


# ---------------------------------------------------------------------------------------------------------- evaluation


@scenario
async def test_evaluation_goes_ahead_of_leases_and_uses_up_credits(tmp_path):
    async with serving(tmp_path, total_slots=4) as server:
        worker = FakeWorker(server)
        await worker.join()
        evaluating = asyncio.create_task(server.evaluate([eval_request(1), eval_request(2)], share=0.5))
        await server.begin()
        await worker.ask(2)
        request = await worker.take(EvalRequest)
        await worker.take(Lease)
        assert await worker.unread() == []
        await worker.evaluate(request)
        assert await worker.take(EvalAck) == EvalAck(request_id=request.request_id)
        await worker.ask(1)
        await worker.evaluate(await worker.take(EvalRequest), acc=0.0)
        answers = await evaluating
        assert [answer.acc for answer in answers] == [1.0, 1.0, 0.0, 0.0]
        assert [answer.prompt_id for answer in answers] == [1000, 1001, 2000, 2001]


@scenario
async def test_evaluation_requests_of_a_lost_worker_are_given_to_another(tmp_path):
    async with serving(tmp_path) as server:
        doomed, other = FakeWorker(server, 0, "first"), FakeWorker(server, 1)
        await doomed.join()
        await doomed.ask(1)
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)], share=1.0))
        await doomed.take(EvalRequest)
        assert "1 evaluation requests are open" in server.status()["why_waiting"]
        await other.join()
        await other.ask(1)
        await FakeWorker(server, 0, "second").join()
        await other.evaluate(await other.take(EvalRequest))
        assert len(await evaluating) == 2


@scenario
async def test_an_evaluation_request_that_a_live_worker_never_answers_is_given_out_again(tmp_path):
    async with serving(tmp_path, heartbeat_s=TICK_S, lease_stall_s=TICK_S) as server:
        worker = FakeWorker(server)
        await worker.join()
        await worker.ask(2)
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)], share=1.0))
        await worker.take(EvalRequest)
        await worker.evaluate(await worker.take(EvalRequest))
        assert len(await evaluating) == 2


@scenario
async def test_a_repeated_evaluation_answer_is_acknowledged_and_counts_once(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        evaluating = asyncio.create_task(server.evaluate([eval_request(1), eval_request(2)], share=1.0))
        await worker.ask(2)
        first, second = await worker.take(EvalRequest), await worker.take(EvalRequest)
        for _ in range(2):
            await worker.evaluate(first)
            assert await worker.take(EvalAck) == EvalAck(request_id=1)
        assert not evaluating.done()
        await worker.evaluate(second)
        assert len(await evaluating) == 4
        await server.begin()
        await answer_all(worker, 2)
        await learner.want(1)
        await learner.receive()
        assert (await server.trained(1, {}))["replay/tokens_evaluation"] == 12


@scenario
async def test_an_evaluation_that_is_given_up_leaves_nothing_behind(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)], share=1.0))
        await asyncio.sleep(0)
        evaluating.cancel()
        await asyncio.gather(evaluating, return_exceptions=True)
        await worker.ask(1)
        assert await worker.unread() == []
        assert server.status()["evaluations_waiting"] == 0


# --------------------------------------------------------------------------------------------------------- a whole run


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
def test_a_run_of_two_workers_and_a_learner_is_sound(tmp_path, run_ahead):
    async def run():
        async with serving(tmp_path, run_ahead=run_ahead) as server:
            rng, learner, lines = random.Random(0), FakeLearner(server), []
            workers = [FakeWorker(server, index) for index in range(2)]
            tasks = [asyncio.create_task(work(worker, rng)) for worker in workers]
            await server.begin()
            for step in range(1, 9):
                await learner.want(step)
                batch, _ = await learner.receive()
                assert len(batch.groups) == 2
                lines.append({"step": step, **await server.trained(step, {})})
                for worker in workers:
                    worker.version = step
                    await worker.client.send(Loaded(version=step))
                await server.published(step)
            await server.finish()
            for task in tasks:
                task.cancel()
        write_files(tmp_path, lines)
        config = (tmp_path / "config.yaml").read_text().replace("run_ahead: 1.0", f"run_ahead: {run_ahead}")
        (tmp_path / "config.yaml").write_text(config)
        assert audit(tmp_path) == []

    asyncio.run(asyncio.wait_for(run(), 20))
