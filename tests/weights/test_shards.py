"""Weights travel from a learner of several shards to receivers, all of them processes of their own."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import Replicate, distribute_tensor

from asyncdapo.learner.model.mesh import mesh_of_one
from asyncdapo.transport.backend import Backend
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receivers import LocalReceiver
from asyncdapo.weights.shards import Shards
from tests.learner.tiny import save_tiny_llama
from tests.rollout.torch_engine.models import engine_for, largest_difference, random_model, request, saved
from tests.weights.members import Failed, Member, fingerprint, members
from tests.weights.shard_ranks import BUCKET_BYTES, ShardRank, weights_of

TIMEOUT_S = 20.0


@contextmanager
def shards_of(num_shards: int, num_ranks: int = 0) -> Iterator[list[Member]]:
    """The ranks of a learner whose weights are those of version 0; as many as there are shards, unless told."""
    num_ranks = num_ranks or num_shards
    with members(num_ranks, ShardRank) as ranks:
        address = ranks[0].do("open", num_ranks)
        for number, rank in enumerate(ranks):
            rank.start("join", address, number, num_ranks, num_shards)
        assert [rank.result() for rank in ranks] == [None] * num_ranks
        yield ranks


def connect(sender: Member, receivers: list[Member], backend: Backend, timeout_s: float = TIMEOUT_S) -> Manifest:
    """Make the group of a transfer."""
    address, manifest = sender.do("host", len(receivers) + 1, backend, timeout_s)
    for number, receiver in enumerate(receivers, start=1):
        receiver.start("join", address, number, len(receivers) + 1, backend, timeout_s)
    assert sender.do("accept") is None
    assert [receiver.result() for receiver in receivers] == [None] * len(receivers)
    return manifest


def publish(ranks: list[Member], receivers: list[Member], manifest: Manifest, version: int) -> list:
    """What the receivers got. `ranks` are those of the replica that sends."""
    begin(ranks, receivers, manifest, version)
    got = [receiver.result() for receiver in receivers]
    assert [rank.result() for rank in ranks] == ["", *[True] * (len(ranks) - 1)]
    return got


def begin(ranks: list[Member], receivers: list[Member], manifest: Manifest, version: int) -> None:
    """Start a transfer."""
    for receiver in receivers:
        receiver.start("receive", manifest, version)
    sender, *others = ranks
    for rank in others:
        rank.start("give", TIMEOUT_S)
    sender.start("send", version)


def make(ranks: list[Member], version: int) -> None:
    for rank in ranks:
        assert rank.do("make", version) is None


MESHES = [(2, 2, 0), (3, 3, 1), (4, 4, 3), (2, 4, 0)]
DEFAULT_MESHES = [(3, 3, 1, "gloo"), (3, 3, 1, "ipc"), (2, 4, 0, "ipc")]


@pytest.mark.parametrize(
    ("num_shards", "num_ranks", "num_elsewhere", "backend"),
    [
        pytest.param(*mesh, backend, marks=[] if (*mesh, backend) in DEFAULT_MESHES else pytest.mark.soak)
        for mesh in MESHES
        for backend in ("gloo", "ipc")
    ],
)
def test_receivers_get_the_whole_weights_bit_by_bit(
    num_shards: int, num_ranks: int, num_elsewhere: int, backend: Backend
) -> None:
    with shards_of(num_shards, num_ranks) as ranks, members(2) as receivers:
        for rank in ranks[num_ranks - num_elsewhere :]:
            rank.do("move_away")
        manifest = connect(ranks[0], receivers, backend)
        for version in (1, 2, 3):
            make(ranks, version)
            got = publish(ranks[:num_shards], receivers, manifest, version)
            assert got == [fingerprint(weights_of(version))] * 2


def test_a_bucket_is_sent_after_a_slow_shard_has_written_its_part() -> None:
    with shards_of(2) as ranks, members(1) as [receiver]:
        manifest = connect(ranks[0], [receiver], "gloo")
        ranks[1].do("slow_down")
        make(ranks, 1)
        assert publish(ranks, [receiver], manifest, 1) == [fingerprint(weights_of(1))]


def test_a_learner_s_trained_shards_arrive_as_its_gathered_weights_at_every_version(tmp_path: Path) -> None:
    path = save_tiny_llama(tmp_path)
    with shards_of(2) as ranks, members(1) as receivers:
        for rank in ranks:
            rank.start("load", path)
        assert [rank.result() for rank in ranks] == [None] * 2
        manifest = connect(ranks[0], receivers, "ipc")
        versions = []
        for version in (1, 2, 3):
            for rank in ranks:
                rank.start("train", version)
            whole, again = (rank.result() for rank in ranks)
            assert whole == again
            assert publish(ranks, receivers, manifest, version) == [whole]
            versions.append(whole)
        assert versions[0] != versions[1] != versions[2]


def test_an_engine_generates_while_shards_are_published_and_samples_with_what_arrived(tmp_path: Path) -> None:
    models = [random_model(seed=version) for version in range(4)]
    files = [str(tmp_path / f"{version}.safetensors") for version in range(4)]
    for model, file in zip(models, files, strict=True):
        save_file(dict(model.named_parameters()), file)

    async def body(ranks: list[Member]) -> None:
        engine = engine_for(saved(models[0], tmp_path / "model"), max_response_length=400)
        end = LocalReceiver(lambda: torch.device("cpu"), TIMEOUT_S)
        await engine.start()
        samples, last = [], asyncio.Event()

        async def generate() -> None:
            while not last.is_set():
                samples.extend(await engine.generate(request(9, range(4), max_tokens=400)))

        take(ranks, files[0])
        address, manifest = ranks[0].do("host", 2, "ipc", TIMEOUT_S)
        ranks[0].start("accept")
        await end.join(address, 1, 2, "ipc", manifest)
        assert ranks[0].result() is None
        generating = asyncio.ensure_future(generate())
        for version in (1, 2, 3):
            await asyncio.to_thread(take, ranks, files[version])
            ranks[1].start("give", TIMEOUT_S)
            ranks[0].start("send", version)
            await engine.load_weights(version, await end.receive(version, 0))
            assert [rank.result() for rank in ranks] == ["", True]
        last.set()
        await generating
        found = [[version for version, _ in sample.versions] for sample in samples]
        assert found
        assert all(versions == sorted(versions) for versions in found)
        asked = request(12, [1, 2], max_tokens=40)
        for sample in await engine.generate(asked):
            assert largest_difference(models[3], asked, sample) < 1e-4
        end.close()
        await engine.stop()

    with shards_of(2) as ranks:
        asyncio.run(body(ranks))


def take(ranks: list[Member], file: str) -> None:
    for rank in ranks:
        assert rank.do("take", file) is None


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_a_rank_killed_in_a_gather_ends_the_transfer_at_once_on_every_side(tmp_path: Path, backend: Backend) -> None:
    with shards_of(3) as ranks, members(2) as receivers:
        manifest = connect(ranks[0], receivers, backend)
        sender, other, victim = ranks
        for receiver in receivers:
            receiver.start("receive", manifest, 1)
        other.start("give", TIMEOUT_S)
        victim.start("die_in_give", TIMEOUT_S, signal.SIGKILL, str(tmp_path / "dead"))
        sender.start("send", 1)
        for rank in (sender, other):
            assert "could not" in rank.result()
        for receiver in receivers:
            assert isinstance(failed := receiver.result(), Failed)
            assert failed.after_s < TIMEOUT_S


def test_a_sender_killed_in_a_gather_fails_the_other_ranks_and_the_receivers_at_once() -> None:
    with shards_of(2) as ranks, members(1) as [receiver]:
        manifest = connect(ranks[0], [receiver], "gloo")
        receiver.start("receive", manifest, 1)
        ranks[1].start("give", TIMEOUT_S)
        ranks[0].start("die_in_send", 1)
        assert "could not give" in ranks[1].result()
        assert isinstance(failed := receiver.result(), Failed)
        assert failed.after_s < TIMEOUT_S


def test_a_rank_that_is_silent_in_a_gather_fails_the_sender_at_the_deadline(tmp_path: Path) -> None:
    with shards_of(2) as ranks, members(1) as [receiver]:
        manifest = connect(ranks[0], [receiver], "gloo", timeout_s=2.0)
        receiver.start("receive", manifest, 1)
        ranks[1].start("die_in_give", TIMEOUT_S, signal.SIGSTOP, str(tmp_path / "stopped"))
        ranks[0].start("send", 1)
        assert "could not send" in ranks[0].result()
        assert isinstance(receiver.result(), Failed)
        os.kill(ranks[1].process.pid, signal.SIGCONT)


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_a_receiver_killed_in_a_transfer_leaves_the_ranks_in_step_and_the_next_transfer_works(backend: Backend) -> None:
    with shards_of(2) as ranks, members(2) as receivers:
        manifest = connect(ranks[0], receivers, backend)
        receivers[0].start("receive", manifest, 1)
        receivers[1].start("die_in_transfer", manifest, 1, BUCKET_BYTES)
        ranks[1].start("give", TIMEOUT_S)
        assert isinstance(ranks[0].do("send", 1), Failed)
        assert ranks[1].result() is False
        assert isinstance(receivers[0].result(), Failed)

        make(ranks, 2)
        manifest = connect(ranks[0], receivers[:1], backend)
        assert publish(ranks, receivers[:1], manifest, 2) == [fingerprint(weights_of(2))]


def test_a_refused_transfer_leaves_the_ranks_in_step() -> None:
    with shards_of(2) as ranks, members(1) as [receiver]:
        manifest = connect(ranks[0], [receiver], "gloo")
        receiver.start("receive", manifest, 7)
        ranks[1].start("give", TIMEOUT_S)
        assert "expects another version" in ranks[0].do("send", 1).reason
        assert ranks[1].result() is False
        assert "expects another version" in receiver.result().reason
        assert publish(ranks, [receiver], manifest, 1) == [fingerprint(weights_of(0))]


def test_a_rank_that_has_had_a_mesh_makes_the_next_one_with_a_new_process() -> None:
    with shards_of(2) as [first, _], members(1, ShardRank) as [new]:
        address = first.do("open", 2)
        new.start("join", address, 1, 2, 2)
        assert first.do("join", address, 0, 2, 2) is None
        assert new.result() is None


@pytest.mark.parametrize(
    ("num_publishes", "num_kills", "backend"),
    [(5, 1, "ipc"), *(pytest.param(40, 10, way, marks=pytest.mark.soak) for way in ("gloo", "ipc"))],
)
def test_a_rank_or_receiver_killed_at_any_moment_costs_one_transfer(
    num_publishes: int, num_kills: int, backend: Backend
) -> None:
    """What is left of the ranks is killed with one of them, as the controller does it."""
    draw = random.Random(num_publishes)
    kills = set(draw.sample(range(1, num_publishes + 1), num_kills))
    with ExitStack() as lives, members(3) as receivers:
        ranks = lives.enter_context(shards_of(2))
        manifest = connect(ranks[0], receivers, backend)
        for version in range(1, num_publishes + 1):
            make(ranks, version)
            if version in kills:
                victim = draw.choice([*ranks, *receivers])
                begin(ranks, receivers, manifest, version)
                time.sleep(draw.uniform(0, 0.02))
                victim.stop()
                settle([*ranks, *receivers], victim)
                if victim in ranks:
                    lives.close()
                    ranks = lives.enter_context(shards_of(2))
                    make(ranks, version)
                else:
                    receivers[receivers.index(victim)] = Member()
                manifest = connect(ranks[0], receivers, backend)
            assert publish(ranks, receivers, manifest, version) == [fingerprint(weights_of(version))] * 3
        for receiver in receivers:
            receiver.stop()


def settle(ends: list[Member], victim: Member) -> None:
    """Every other end has an answer well before its deadline: that the version arrived, or why not."""
    began_s = time.monotonic()
    for end in ends:
        if end is not victim:
            end.result()
    assert time.monotonic() - began_s < TIMEOUT_S


def test_tensors_that_are_not_divided_by_rows_are_refused() -> None:
    mesh = mesh_of_one(torch.device("cpu"))
    whole = distribute_tensor(torch.zeros(4, 4), mesh, [Replicate(), Replicate()])
    with pytest.raises(ValueError, match="weight is not divided by rows"):
        Shards({"weight": whole})
