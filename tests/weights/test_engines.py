"""Weights from shards to engines of both kinds, which generate meanwhile, whoever is killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

pytest.importorskip("vllm")

from asyncdapo.errors import EngineError, WeightsError
from asyncdapo.transport.backend import Backend
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receivers import EngineReceiver
from tests.rollout.torch_engine.models import largest_difference, request, saved
from tests.weights.members import Failed, Member, fingerprint, members
from tests.weights.test_shards import shards_of
from tests.weights.torch_worker import TorchWorker
from tests.weights.vllm_engines import NUM_VERSIONS, PARITY, Traffic, engine_of, model_of, tensors_of

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

TIMEOUT_S = 60.0
PATIENCE_S = 120.0
LONGEST_BEFORE_KILL_S = 0.3
GONE = EOFError | OSError | EngineError
"""What is heard of an end whose process was killed."""
TORCH_HOST = "of torch"
AT_DEADLINE = "no end within"
"""In the error of an end that has waited for its deadline."""


class VllmWorker:
    """vLLM that always generates, and its receiver; here, since a member may have no children."""

    def __init__(self, model: Path) -> None:
        self.engine = engine_of(model)
        self.end = EngineReceiver(self.engine.rpc, TIMEOUT_S)
        self.traffic: Traffic | None = None

    async def begin(self) -> None:
        await self.engine.start()
        self.traffic = Traffic(self.engine)

    async def receive(self, version: int) -> list[str]:
        """Receive this version and load it. Returns a digest of the weights that the engine then has."""
        await self.end.receive(version, 0)
        await self.engine.load_weights(version, None)
        return await self.engine.rpc("weights_digest")

    async def kill(self) -> None:
        os.kill(self.engine.pids()[0], signal.SIGKILL)
        with pytest.raises(EngineError):
            await self.engine.ended()
        await self.stop()

    async def stop(self) -> None:
        """The requests in flight fail."""
        await self.engine.stop()
        await asyncio.gather(*self.traffic._tasks, return_exceptions=True)


class Fleet:
    """Two torch workers on a planted host of their own, one of vLLM, and the ranks of a learner of two shards. Under
    `ipc` the first torch worker leads its host, and the second one reads its memory."""

    def __init__(self, lives: ExitStack, directory: Path, backend: Backend) -> None:
        self.directory, self.backend = directory, backend
        self.ranks_lives, self.ranks = lives.enter_context(ExitStack()), []
        self.torch: list[Member] = lives.enter_context(members(2, TorchWorker))
        self.vllm = VllmWorker(directory / "checkpoint")

    async def begin(self) -> None:
        for member in self.torch:
            self._begin_torch(member)
        await self.vllm.begin()
        self.live_ranks()

    def _begin_torch(self, member: Member) -> None:
        assert member.do("begin", str(self.directory / "checkpoint"), TIMEOUT_S, TORCH_HOST) is None

    def live_ranks(self) -> None:
        """Start both ranks. The old ones are killed first, as the controller does it."""
        self.ranks_lives.close()
        self.ranks = self.ranks_lives.enter_context(shards_of(2))
        self.take(0)

    def take(self, version: int) -> None:
        for rank in self.ranks:
            assert rank.do("take", str(self.directory / f"{version % NUM_VERSIONS}.safetensors")) is None

    async def connect(self) -> None:
        address, manifest = self.ranks[0].do("host", 4, self.backend, TIMEOUT_S)
        await asyncio.gather(
            asyncio.to_thread(self.ranks[0].do, "accept"),
            *(self._join(member, address, rank, manifest) for rank, member in enumerate(self.torch, 1)),
            self.vllm.end.join(address, 3, 4, self.backend, manifest),
        )

    async def _join(self, member: Member, address: str, rank: int, manifest: Manifest) -> None:
        assert await asyncio.to_thread(member.do, "join", address, rank, 4, self.backend, manifest) is None

    def begin_transfer(self, version: int) -> list[Awaitable[Any]]:
        """The answers of both ranks, of both torch workers and of vLLM."""
        self.ranks[1].start("give", TIMEOUT_S)
        self.ranks[0].start("send", version)
        for member in self.torch:
            member.start("receive", version)
        answers = [asyncio.to_thread(end.result) for end in (*self.ranks, *self.torch)]
        return [*map(asyncio.ensure_future, answers), asyncio.ensure_future(self.vllm.receive(version))]

    async def publish(self, version: int) -> str:
        """Every engine has it, bit by bit. Returns vLLM's digest."""
        sent, given, *prints, [digest] = await asyncio.gather(*self.begin_transfer(version))
        assert (sent, given) == ("", True)
        assert prints == [fingerprint(tensors_of(version % NUM_VERSIONS))] * 2
        return digest

    async def lose(self, victim: str, version: int, after_s: float) -> bool:
        """Kill it in the middle of a transfer. No other end waits for its deadline; then the victim lives again.
        Returns whether the transfer failed."""
        answers = self.begin_transfer(version)
        await asyncio.sleep(after_s)
        if victim == "vllm":
            await self.vllm.kill()
        else:
            {"sender": self.ranks, "giver": self.ranks[1:], "torch": self.torch}[victim][0].stop()
        async with asyncio.timeout(PATIENCE_S):
            found = await asyncio.gather(*answers, return_exceptions=True)
        for answer in found:
            assert not isinstance(answer, Exception) or isinstance(answer, GONE | WeightsError)
            assert AT_DEADLINE not in str(answer)
        await self._revive(victim)
        return any(isinstance(answer, WeightsError | Failed) for answer in found)

    async def _revive(self, victim: str) -> None:
        if victim in ("sender", "giver"):
            self.live_ranks()
        elif victim == "torch":
            self.torch[0] = Member(TorchWorker)
            self._begin_torch(self.torch[0])
        else:
            self.vllm = VllmWorker(self.directory / "checkpoint")
            await self.vllm.begin()

    async def check_all_generate(self) -> None:
        """Every engine samples more tokens from now on."""
        counts: list[Callable[[], Awaitable[float]]] = [
            *(partial(asyncio.to_thread, member.do, "num_tokens") for member in self.torch),
            self._tokens_of_vllm,
        ]
        for count in counts:
            before = await count()
            async with asyncio.timeout(PATIENCE_S):
                while await count() == before:
                    await asyncio.sleep(0.01)

    async def _tokens_of_vllm(self) -> float:
        return self.vllm.engine.gauges()["tokens"]

    async def check_all_compute_with(self, version: int) -> None:
        asked, model = request(12, [1, 2], max_tokens=40), model_of(version % NUM_VERSIONS)
        answers = [await asyncio.to_thread(member.do, "sample") for member in self.torch]
        for sample in [*(sample for one in answers for sample in one), *await self.vllm.engine.generate(asked)]:
            assert largest_difference(model, asked, sample) < PARITY


@asynccontextmanager
async def fleet(directory: Path, backend: Backend) -> AsyncIterator[Fleet]:
    with ExitStack() as lives:
        made = Fleet(lives, directory, backend)
        async with AsyncExitStack() as ends:
            await made.begin()
            ends.push_async_callback(lambda: made.vllm.stop())
            yield made


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_every_engine_has_every_version_bit_by_bit_though_ranks_and_workers_are_killed(
    tmp_path: Path, backend: Backend
) -> None:
    num_publishes, num_kills = 40, 10
    saved(model_of(0), tmp_path / "checkpoint")
    for version in range(NUM_VERSIONS):
        save_file(tensors_of(version), tmp_path / f"{version}.safetensors")
    draw = random.Random(backend)
    victims = ["sender"] * 2 + ["giver"] * 3 + ["torch"] * 3 + ["vllm"] * 2
    kills = dict(zip(draw.sample(range(1, num_publishes + 1), num_kills), victims, strict=True))

    async def body() -> None:
        digests: dict[int, set[str]] = {}
        num_failed = 0
        async with fleet(tmp_path, backend) as workers:
            await workers.connect()
            for version in range(1, num_publishes + 1):
                workers.take(version)
                if version in kills:
                    after_s = draw.uniform(0, LONGEST_BEFORE_KILL_S)
                    num_failed += await workers.lose(kills[version], version, after_s)
                    await workers.check_all_generate()
                    workers.take(version)
                    await workers.connect()
                digests.setdefault(version % NUM_VERSIONS, set()).add(await workers.publish(version))
                await workers.check_all_generate()
            await workers.check_all_compute_with(num_publishes)
        print(f"{backend}: {num_publishes} versions, {num_kills} kills, of which {num_failed} failed a transfer")
        assert [len(found) for found in digests.values()] == [1] * NUM_VERSIONS
        assert len(set.union(*digests.values())) == NUM_VERSIONS

    asyncio.run(body())
