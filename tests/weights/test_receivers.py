"""The ends of rollout workers: of an engine in this process, and of one with processes of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncdapo.errors import EngineError, WeightsError
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.deadline import Deadline
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.header import agree
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receive_buffer import ReceiveBuffer
from asyncdapo.weights.receivers import EngineReceiver, LocalReceiver
from asyncdapo.weights.sender import WeightSender
from tests.weights.members import Failed, Member, header_of, members
from tests.weights.trainers import Trainer

HOST = torch.device("cpu")
BUCKET_BYTES = 4096

both_ways = pytest.mark.parametrize("backend", ["gloo", "ipc"])


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"embed": torch.randn(100, 30, generator=draw), "norm": torch.randn(30, generator=draw)}


MANIFEST = Manifest.of(tensors_of(0))

OPENED: list[WeightGroup] = []


@pytest.fixture(autouse=True)
def _every_learner_leaves() -> Iterator[None]:
    """A group that is dropped with a transfer under way holds everything up until the transfer's deadline."""
    yield
    for group in OPENED:
        group.close()
    OPENED.clear()


class Learner:
    """The sender's side, in threads: `form` opens a group that ends may join, `send` brings them a version."""

    def __init__(self, world_size: int = 2, backend: Backend = "gloo", timeout_s: float = 20.0) -> None:
        self.group = WeightGroup.create_master("127.0.0.1", world_size, backend, timeout_s)
        self.address = self.group.address
        OPENED.append(self.group)

    async def accept(self, *joins: Coroutine[Any, Any, None]) -> None:
        await asyncio.gather(asyncio.to_thread(self.group.connect), *joins)
        self.sender = WeightSender(self.group, MANIFEST, BUCKET_BYTES)

    async def send(self, version: int, tensors: dict[str, torch.Tensor], branch: int = 0) -> None:
        await asyncio.to_thread(self.sender.send, version, tensors, branch=branch)

    def announce(self, version: int) -> None:
        with suppress(WeightsError):
            agree(self.group, header_of(MANIFEST, version, BUCKET_BYTES), Deadline(20.0))


class Workers:
    """An engine of several processes, which all live in this one; the first one receives."""

    def __init__(self, num_processes: int) -> None:
        self.buffers = [ReceiveBuffer(HOST, shared=num_processes > 1) for _ in range(num_processes)]
        self.dead = False

    async def rpc(self, method: str, *args: Any) -> list[Any]:
        if self.dead:
            raise EngineError("the engine is gone")
        return [getattr(self, method)(number, buffer, *args) for number, buffer in enumerate(self.buffers)]

    def weights_device(self, number: int, buffer: ReceiveBuffer) -> str:
        return f"cuda {number} on x"

    def join_weights(self, number: int, buffer: ReceiveBuffer, *args: Any) -> None:
        *where, manifest, timeout_s = args
        if number == 0:
            buffer.join(*where, msgspec.msgpack.decode(manifest, type=Manifest), timeout_s)

    def receive_weights(self, number: int, buffer: ReceiveBuffer, version: int, branch: int) -> None:
        if number == 0:
            buffer.receive(version, branch)

    def weights_state(self, number: int, buffer: ReceiveBuffer) -> tuple[bool, str]:
        try:
            return buffer.settled(), ""
        except WeightsError as error:
            return True, str(error)

    def weights_memory(self, number: int, buffer: ReceiveBuffer) -> tuple[str, bytes]:
        return buffer.memory, buffer.handle

    def open_weights_memory(self, number: int, buffer: ReceiveBuffer, handle: bytes, manifest: bytes) -> None:
        if number:
            buffer.open(handle, msgspec.msgpack.decode(manifest, type=Manifest))


def same(arrived: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> bool:
    return arrived.keys() == sent.keys() and all(torch.equal(arrived[name], sent[name]) for name in sent)


# ----------------------------------------------------------------------------------------------------- in this process


@both_ways
def test_a_local_end_receives_version_after_version(backend: Backend) -> None:
    async def body() -> None:
        learner, end = Learner(backend=backend), LocalReceiver(lambda: HOST, 20.0)
        await learner.accept(end.join(learner.address, 1, 2, backend, MANIFEST))
        for version in (1, 2, 3):
            arriving = asyncio.ensure_future(end.receive(version, 0))
            await learner.send(version, tensors_of(version))
            assert same(await arriving, tensors_of(version))
        end.close()

    asyncio.run(body())


@both_ways
@pytest.mark.parametrize("end_of_trainer", ["fall_silent", "die"])
def test_a_trainer_that_ends_in_the_middle_fails_a_local_end_and_the_next_group_works(
    tmp_path: Path, backend: Backend, end_of_trainer: str
) -> None:
    weights = str(tmp_path / "weights.safetensors")
    save_file({"embed": torch.randn(100, 300), "norm": torch.randn(30)}, weights)

    async def joined(trainer: Member, end: LocalReceiver) -> None:
        address, manifest = trainer.do("host", 2, backend, 20.0, weights)
        trainer.start("accept")
        await end.join(address, 1, 2, backend, manifest)
        assert trainer.result() is None

    async def body() -> None:
        end = LocalReceiver(lambda: HOST, 1.0)
        with members(2, Trainer) as [lost, trainer]:
            await joined(lost, end)
            lost.start(end_of_trainer, 1)
            with pytest.raises(WeightsError):
                await end.receive(1, 0)
            await joined(trainer, end)
            trainer.start("send", 1, weights)
            assert same(await end.receive(1, 0), load_file(weights))
            assert not isinstance(trainer.result(), Failed)
        end.close()

    asyncio.run(body())


def test_a_learner_that_leaves_the_group_fails_an_end_at_once_and_the_next_group_works() -> None:
    async def body() -> None:
        first, second, end = Learner(), Learner(), LocalReceiver(lambda: HOST, 20.0)
        await first.accept(end.join(first.address, 1, 2, "gloo", MANIFEST))
        arriving = asyncio.ensure_future(end.receive(1, 0))
        began_s = time.monotonic()
        first.group.close()
        with pytest.raises(WeightsError):
            await arriving
        await second.accept(end.join(second.address, 1, 2, "gloo", MANIFEST))
        assert time.monotonic() - began_s < 20.0
        end.close()

    asyncio.run(body())


@both_ways
def test_an_end_that_fails_fails_the_ends_behind_it_before_their_deadline(backend: Backend) -> None:
    """With four ranks a broadcast reaches the last one by way of another end."""

    async def body() -> None:
        learner, ends = Learner(4, backend, 5.0), [LocalReceiver(lambda: HOST, 5.0) for _ in range(3)]
        joins = (end.join(learner.address, rank, 4, backend, MANIFEST) for rank, end in enumerate(ends, 1))
        await learner.accept(*joins)
        arriving = [asyncio.ensure_future(end.receive(1, 0)) for end in ends]
        await asyncio.to_thread(learner.announce, 1)
        learner.group.close()
        for error in await asyncio.gather(*arriving, return_exceptions=True):
            assert isinstance(error, WeightsError)
            assert "no end within" not in str(error)
        for end in ends:
            end.close()

    asyncio.run(body())


def test_an_end_without_a_group_says_so() -> None:
    with pytest.raises(WeightsError, match="joined no group"):
        asyncio.run(LocalReceiver(lambda: HOST, 1.0).receive(1, 0))


# --------------------------------------------------------------------------------------------- in an engine's processes


@both_ways
@pytest.mark.parametrize("num_processes", [1, 3])
def test_every_process_of_an_engine_finds_the_version_that_the_first_one_received(
    backend: Backend, num_processes: int
) -> None:
    async def body() -> None:
        learner, workers = Learner(backend=backend), Workers(num_processes)
        end = EngineReceiver(workers.rpc, 20.0)
        assert await end.device() == "cuda 0 on x"
        await learner.accept(end.join(learner.address, 1, 2, backend, MANIFEST))
        for version in (7, 8):
            arriving = asyncio.ensure_future(end.receive(version, 0))
            await learner.send(version, tensors_of(version))
            assert await arriving is None
            assert all(same(buffer.take(version), tensors_of(version)) for buffer in workers.buffers)

    asyncio.run(body())


def test_no_process_of_an_engine_takes_a_version_while_the_next_one_arrives_or_after_it_failed() -> None:
    async def body() -> None:
        learner, workers = Learner(), Workers(2)
        end = EngineReceiver(workers.rpc, 20.0)
        await learner.accept(end.join(learner.address, 1, 2, "gloo", MANIFEST))
        arriving = asyncio.ensure_future(end.receive(1, 0))
        await learner.send(1, tensors_of(1))
        await arriving
        arriving = asyncio.ensure_future(end.receive(2, 0))
        await asyncio.sleep(0)
        for buffer in workers.buffers:
            with pytest.raises(WeightsError, match="version 1 has not arrived here: nothing is staged"):
                buffer.take(1)
        learner.group.close()
        with pytest.raises(WeightsError):
            await arriving
        for buffer in workers.buffers:
            with pytest.raises(WeightsError, match="nothing is staged"):
                buffer.take(2)

    asyncio.run(body())


def test_what_fails_in_the_process_that_receives_fails_the_end() -> None:
    async def body() -> None:
        learner, workers = Learner(), Workers(2)
        end = EngineReceiver(workers.rpc, 1.0)
        await learner.accept(end.join(learner.address, 1, 2, "gloo", MANIFEST))
        arriving = asyncio.ensure_future(end.receive(1, 0))
        await asyncio.to_thread(learner.announce, 2)
        with pytest.raises(WeightsError, match="expects another version"):
            await arriving

    asyncio.run(body())


def test_an_engine_that_dies_meanwhile_ends_the_wait() -> None:
    async def body() -> None:
        learner, workers = Learner(), Workers(1)
        end = EngineReceiver(workers.rpc, 20.0)
        await learner.accept(end.join(learner.address, 1, 2, "gloo", MANIFEST))
        arriving = asyncio.ensure_future(end.receive(1, 0))
        await asyncio.sleep(0)
        workers.dead = True
        with pytest.raises(EngineError, match="the engine is gone"):
            await arriving

    asyncio.run(body())


# ------------------------------------------------------------------------------------------------------------- buffer


def test_only_the_version_that_has_arrived_is_given_out() -> None:
    async def body() -> None:
        learner, buffer = Learner(), ReceiveBuffer(HOST)
        joining = asyncio.wrap_future(buffer.join(learner.address, 1, 2, "gloo", MANIFEST, 20.0))
        await learner.accept(_finished(joining))
        receiving = buffer.receive(3, 0)
        assert not buffer.settled()
        await learner.send(3, tensors_of(3))
        await asyncio.wrap_future(receiving)
        assert buffer.settled()
        with pytest.raises(WeightsError, match="version 4 has not arrived here: version 3 is staged"):
            buffer.take(4)
        assert same(buffer.take(3), tensors_of(3))
        buffer.close()

    asyncio.run(body())


def test_the_thread_that_receives_leaves_the_caller_free() -> None:
    """A worker of an engine answers while it waits for a learner that says nothing."""
    buffer = ReceiveBuffer(HOST)
    learner = Learner()
    joining = buffer.join(learner.address, 1, 2, "gloo", MANIFEST, 20.0)
    assert not buffer.settled()
    assert threading.current_thread().name != "weights"
    learner.group.connect()
    joining.result()
    assert buffer.settled()
    buffer.close()


async def _finished(future: asyncio.Future[None]) -> None:
    await future


# ---------------------------------------------------------------------------------------------------- room for a stream


def test_an_end_makes_room_before_it_joins_so_that_no_deadline_of_a_transfer_runs_meanwhile(monkeypatch) -> None:
    making = ReceiveBuffer._make_room

    def slowly(self: ReceiveBuffer, manifest: Manifest) -> None:
        time.sleep(0.5 if len(self._room.stream_U) != manifest.offsets[-1] else 0)
        making(self, manifest)

    monkeypatch.setattr(ReceiveBuffer, "_make_room", slowly)

    async def body() -> None:
        end = LocalReceiver(lambda: HOST, 0.3)
        await end.make_room(MANIFEST)
        learner = Learner(timeout_s=0.3)
        await learner.accept(end.join(learner.address, 1, 2, "gloo", MANIFEST))
        arriving = asyncio.ensure_future(end.receive(1, 0))
        await learner.send(1, tensors_of(1))
        assert same(await arriving, tensors_of(1))
        end.close()

    asyncio.run(body())


@pytest.mark.parametrize("shared", [False, True])
def test_an_engine_that_the_machine_has_no_memory_for_says_how_much_it_is_short_of(monkeypatch, shared: bool) -> None:
    num_bytes = MANIFEST.offsets[-1]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=num_bytes))
    ReceiveBuffer(HOST, shared=shared).make_room(MANIFEST).result()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=num_bytes - 1))
    with pytest.raises(WeightsError, match=r"GiB of the machine's memory for each engine, and .* are free"):
        ReceiveBuffer(HOST, shared=shared).make_room(MANIFEST).result()
