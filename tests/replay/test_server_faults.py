"""Workers that fall silent, stall or come back at the replay server, and peers that send noise."""

import asyncio
import random
from contextlib import contextmanager

import psutil
import pytest
import zmq
import zmq.asyncio

from asyncdapo.errors import RunError
from asyncdapo.messages import (
    Ack,
    GroupDone,
    GroupFailed,
    Lease,
    Loaded,
    Started,
    Welcome,
    Withdraw,
)
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.replay.server.failures import MIN_FAILED
from asyncdapo.transport.codec import encode
from tests.asynchronous import asynchronous
from tests.replay.serving import TICK_S, FakeLearner, FakeWorker, rows, serving, until
from tests.replay.small_run import make_group, write_files

# ------------------------------------------------------------------------------------------------- loss and coming back


@asynchronous
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


@asynchronous
async def test_a_silent_worker_is_lost_and_one_that_speaks_again_works_again(tmp_path):
    async with serving(tmp_path, heartbeat_s=TICK_S) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        await until(lambda: server.status()["suspected_workers"] == [0], server)
        assert "nothing heard for long from workers [0]" in server.status()["why_waiting"]
        await until(lambda: server.status()["workers"] == 0, server)
        assert server.status()["lost_workers"] == [0]
        assert server.status()["why_waiting"].startswith(("no live worker", "learner"))
        await worker.ask(1)
        await worker.beat({lease.lease_id: 5})
        assert lease.lease_id in (await worker.take(Withdraw)).lease_ids
        assert (await worker.take(Lease)).lease_id > lease.lease_id
        assert server.status()["workers"] == 1
        assert server.status()["lost_workers"] == []


@asynchronous
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


@asynchronous
async def test_a_heartbeat_that_reports_a_lease_that_is_over_is_told_so(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await worker.beat({41: 3, 42: 3})
        assert await worker.take(Withdraw) == Withdraw(lease_ids=[41, 42])


# ------------------------------------------------------------------------------------------------------------ memory


def resident_mib():
    return psutil.Process().memory_info().rss / 2**20


@asynchronous
async def test_what_workers_send_while_the_learner_is_held_up_leaves_memory_as_it_was(tmp_path):
    """Groups of 320 kB: 150 that the filter drops, and 150 times one that was delivered before."""
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        long = {"versions": ((0, 20_000),)}
        delivered, _ = await worker.leases(2)
        await worker.answer(delivered, **long)
        await worker.take(Ack)
        before = resident_mib()
        for _ in range(150):
            await worker.answer(delivered, **long)
            await worker.take(Ack)
            [dropped] = await worker.leases(1)
            await worker.answer(dropped, accs=(1.0, 1.0), **long)
            await worker.take(Ack)
            await worker.beat()
            worker.passed_over.clear()
        assert resident_mib() - before < 24
        assert server.status()["dropped"]["duplicates"] == 150


# -------------------------------------------------------------------------------------------------- strangers and noise


@asynchronous
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
@asynchronous
async def test_mutated_frames_of_a_known_worker_neither_end_nor_confuse_the_server(tmp_path, seed):
    async with serving(tmp_path) as server:
        noisy, worker = FakeWorker(server, 1), FakeWorker(server, 0)
        await noisy.join()
        await worker.join()
        await server.begin()
        leases = await noisy.leases(2)
        noisy.close()
        groups = [make_group(lease, worker=1) for lease in leases]
        messages = [encode(GroupDone(group=group), payload.frames()) for group, payload in groups]
        messages += [encode(Started(lease_id=leases[0].lease_id, version=0)), encode(Loaded(version=0, branch=0))]
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


@asynchronous
async def test_noise_on_the_learners_socket_is_dropped(tmp_path):
    async with serving(tmp_path) as server:
        learner = FakeLearner(server)
        with raw_peer(server.learner_address, b"noise") as socket:
            await socket.send_multipart([b"\xc1 noise"])
            await learner.want(99)
            await until(lambda: server.status()["dropped"]["malformed"] == 2, server)


@asynchronous
async def test_a_reward_function_that_fails_too_often_ends_the_run_with_its_last_words(tmp_path):
    words = "reward.max_failure_ratio: .* raised on 20 of the last 20 groups, allowed are 50%; the last: no such judge"
    with pytest.raises(RunError, match=words):
        async with serving(tmp_path, server_settings={"max_failure_ratio": 0.5}) as server:
            worker = FakeWorker(server)
            await worker.join()
            await server.begin()
            for _ in range(MIN_FAILED):
                assert not server.serving.done()
                (lease,) = await worker.leases(1)
                await worker.client.send(GroupFailed(lease_id=lease.lease_id, reason="no such judge"))
            await server.serving


@asynchronous
async def test_groups_on_which_the_reward_function_raised_stand_in_the_wait(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        await server.begin()
        await learner.want(1)
        for reason in ("no such judge", "no such answer"):
            (lease,) = await worker.leases(1)
            await worker.client.send(GroupFailed(lease_id=lease.lease_id, reason=reason))
        await until(lambda: server.status()["failed"] == 2, server)
        status = server.status()
        assert status["why_waiting"].endswith("; 2 groups failed since the last batch: the reward function raised")
        assert status["last_failure"] == "no such answer"


@asynchronous
async def test_a_run_whose_workers_are_all_lost_for_long_ends(tmp_path):
    with pytest.raises(RunError, match="no live worker"):
        async with serving(tmp_path, heartbeat_s=0.01, lease_stall_s=60) as server:
            await FakeWorker(server).join()
            await server.serving
