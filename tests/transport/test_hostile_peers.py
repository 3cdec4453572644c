"""The real replay server under fire: no crash, flat memory, valid peers served; without a key, nothing at all.

50,000 damaged messages of peers that have the run's key (in the soak 300,000), on both of its sockets: a stranger's,
those of a worker that has joined and holds leases, hellos, and questions for batches. A worker and a learner do their
work meanwhile.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from asyncdapo.messages import Ack, Ask, GroupDone, GroupFailed, Heartbeat, Loaded, Message, Progress, Started
from asyncdapo.replay.ledger.audit import audit
from asyncdapo.replay.server.server import ReplayServer
from asyncdapo.shares import CutWanted
from asyncdapo.transport.codec import Malformed, encode
from asyncdapo.transport.keys import RunKeys
from asyncdapo.transport.payload import pack_answers
from asyncdapo.transport.sockets import Client, Server
from tests.replay import serving as replay_side
from tests.replay.serving import FakeLearner, FakeWorker, eval_answers, eval_request, serving
from tests.replay.small_run import make_group, write_files
from tests.transport.mutations import Attacker, under_attack

WARM_UP = 20_000
"""Messages after which memory counts: imports, caches and the allocator's pools are there by then."""
MAX_GROWTH_MB = 64
"""In the soak 230 bytes a message. Behind thousands of other tests in a process it was 47 MB, with no leak: alone
it shrinks, however many messages there are."""
MAX_GAP = 10_000
"""Damaged messages that may come between two acknowledged groups."""
KEYLESS = b"keyless"
ANY_STALENESS = 10**6
VALID_WORKER = 60_000
"""Far from the numbers that damaged hellos bear: whoever has the key may speak for any worker."""


@pytest.mark.parametrize("num_messages", [50_000, pytest.param(300_000, marks=pytest.mark.soak)])
def test_damaged_messages_cost_no_memory_and_valid_peers_are_served_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_messages: int
) -> None:
    caplog.set_level(logging.CRITICAL, "replay")  # pytest keeps every line of a log in memory
    keys = RunKeys.make()
    monkeypatch.setattr(replay_side, "Client", partial(Client, curve=keys.client))
    heard = listen(monkeypatch)

    async def run() -> None:
        async with serving(tmp_path, curve=keys.server, run_ahead=4.0, max_staleness=ANY_STALENESS) as server:
            noisy = FakeWorker(server, 1)
            await noisy.join()
            await server.begin()
            attackers = damaged_messages(server, noisy, await noisy.leases(2))
            noisy.close()
            life = ValidLife(server, heard)
            living = asyncio.create_task(life.live())
            heard.clear()
            keyless = [replace(attackers[0], identity=KEYLESS)]
            with under_attack(attackers, keys.client, 7, num_messages), under_attack(keyless, None, 8, num_messages):
                await until_heard(heard, WARM_UP, server, living)
                before_mb, began = memory_mb(), time.monotonic()
                await until_heard(heard, num_messages, server, living)
                rate = (num_messages - WARM_UP) / (time.monotonic() - began)
            await until_silent(heard)  # a slow disk fills the queues of ZeroMQ, whose lengths are bounded
            growth_mb = memory_mb() - before_mb
            life.going_on = False
            await living
            await server.finish()
            print(
                f"{rate:.0f} messages/s, {growth_mb:.1f} MB, {len(life.lines)} steps, gap {life.longest_gap} messages"
            )
            assert heard["keyless"] == 0
            assert heard["malformed"] > num_messages / 2
            assert growth_mb < MAX_GROWTH_MB
            assert life.longest_gap < MAX_GAP
            assert len(life.lines) > 20
        write_files(tmp_path, life.lines)
        config = tmp_path / "config.yaml"
        config.write_text(config.read_text().replace("max_staleness: 1", f"max_staleness: {ANY_STALENESS}"))
        assert audit(tmp_path) == []

    asyncio.run(asyncio.wait_for(run(), 280))  # ends a hang; on a busy machine they take minutes


class ValidLife:
    """A worker and a learner that continue their work, step after step."""

    def __init__(self, server: ReplayServer, heard: Counter[str]) -> None:
        self._server, self._heard = server, heard
        self.lines: list[dict[str, float]] = []
        self.longest_gap = 0
        self.going_on = True

    async def live(self) -> None:
        with closing(FakeWorker(self._server, VALID_WORKER)) as worker, closing(FakeLearner(self._server)) as learner:
            await self._work(worker, learner)

    async def _work(self, worker: FakeWorker, learner: FakeLearner) -> None:
        await worker.join()
        at = 0
        while self.going_on:
            step, batch_step = len(self.lines) + 1, 0
            while batch_step != step:  # answers to repeated questions come late
                [lease] = await worker.leases(1)
                await worker.answer(lease)
                await worker.take(Ack)
                self.longest_gap, at = max(self.longest_gap, self._heard["malformed"] - at), self._heard["malformed"]
                await learner.want(step)
                with suppress(TimeoutError):
                    batch_step = (await asyncio.wait_for(learner.receive(), 0.02)).step
            metrics = await self._server.trained(step, {"learner/loss": 0.5})
            await self._server.published(step)
            self.lines.append({"step": step, **metrics})
            await asyncio.sleep(0.02)


def damaged_messages(server: ReplayServer, noisy: FakeWorker, leases) -> list[Attacker]:
    """Who attacks with what. Nobody asks for leases in a joined worker's name: a worker with the key may keep them."""
    encoded = [encode(GroupDone(group=group), payload.frames()) for group, payload in map(of_worker_1, leases)]
    groups = [list(map(bytes, frames)) for frames in encoded]  # which travel to another process
    joined: list[Message] = [
        Started(lease_id=leases[0].lease_id, version=0),
        Loaded(version=0, branch=0),
        GroupFailed(lease_id=leases[1].lease_id, reason="x"),
    ]
    progress = {leases[0].lease_id: Progress(num_tokens=3, phase="sampling")}
    beat = Heartbeat(asked=4, loaded_version=0, branch=0, progress=progress, evaluations=[], gauges={"tokens": 1.0})
    answers = encode(*pack_answers(1, eval_answers(eval_request(1), response="Answer: 6")))
    as_worker = groups * 2 + [encode(message) for message in joined] + [answers]
    return [
        Attacker(server.rollout_address, b"stranger", [*as_worker, encode(Ask(asked=4)), encode(beat)]),
        Attacker(server.rollout_address, b"rollout-1-first", as_worker),
        Attacker(server.rollout_address, b"greeter", [encode(noisy.hello())]),
        Attacker(server.learner_address, b"curious", [encode(CutWanted(step=1))]),
    ]


of_worker_1 = partial(make_group, worker=1)


def listen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what the replay server hears of others than the valid peers."""
    heard: Counter[str] = Counter()

    class ListeningServer(Server):
        def _decode(self, frames):
            peer, message, buffers = super()._decode(frames)
            if not peer.startswith((b"learner", b"rollout-60000")):
                heard["all"] += 1
                heard["malformed"] += isinstance(message, Malformed)
                heard["keyless"] += peer == KEYLESS
            return peer, message, buffers

    monkeypatch.setattr("asyncdapo.replay.server.server.Server", ListeningServer)
    return heard


async def until_heard(heard: Counter[str], num: int, server: ReplayServer, living: asyncio.Task[None]) -> None:
    while heard["all"] < num:
        await asyncio.sleep(0.05)
        for task in (server.serving, living):
            if task.done():
                task.result()


async def until_silent(heard: Counter[str]) -> None:
    """Until what the attackers left in the queues is taken."""
    num = -1
    while heard["all"] > num:
        num = heard["all"]
        await asyncio.sleep(0.5)


def memory_mb() -> float:
    """Resident memory of this process, without what the allocator keeps of what was freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss / 1e6
