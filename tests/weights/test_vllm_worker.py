"""Weights on their way into vLLM engines that generate: two engines, and a learner in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from asyncdapo.errors import WeightsError
from asyncdapo.rollout.engine import Sample
from asyncdapo.rollout.vllm_engine.vllm_engine import VllmEngine
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.receivers import EngineReceiver
from tests.rollout.torch_engine.models import largest_difference, random_model, request, saved
from tests.weights.members import Member, members
from tests.weights.test_shards import shards_of, take
from tests.weights.trainers import Trainer
from tests.weights.vllm_engines import (
    NUM_IN_FLIGHT,
    NUM_VERSIONS,
    PARITY,
    TIMEOUT_S,
    assert_computes_with,
    digests,
    ends_of,
    engine_of,
    joined,
    model_of,
    publish,
    tensors_of,
    traffic,
)

pytestmark = pytest.mark.vllm

SHORT_TIMEOUT_S = 1.5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, versions as files, and files that aren't versions of it."""
    directory = tmp_path_factory.mktemp("weights")
    saved(model_of(0), directory / "checkpoint")
    for version in range(NUM_VERSIONS):
        save_file(tensors_of(version), directory / f"{version}.safetensors")
    tensors = tensors_of(1)
    first = next(name for name in tensors if "q_proj" in name)
    save_file({name: t for name, t in tensors.items() if name != first}, directory / "gap.safetensors")
    save_file(tensors | {first: tensors[first][:-1].clone()}, directory / "misshapen.safetensors")
    in_the_middle = "model.layers.0.self_attn.l_unheard_of.weight"  # when a part of a fused projection has been taken
    save_file(tensors | {in_the_middle: torch.zeros(3)}, directory / "unknown.safetensors")
    return directory


@pytest.fixture(scope="module")
def loop() -> Iterator[object]:
    with asyncio.Runner() as runner:
        yield lambda work: runner.run(asyncio.wait_for(work, 200))


@pytest.fixture(scope="module")
def engines(directory: Path, loop) -> Iterator[list[VllmEngine]]:
    engines = [engine_of(directory / "checkpoint") for _ in range(2)]

    async def start() -> None:
        await asyncio.gather(*(engine.start() for engine in engines))

    async def stop() -> None:
        await asyncio.gather(*(engine.stop() for engine in engines))

    loop(start())
    yield engines
    loop(stop())


@pytest.fixture
def trainer() -> Iterator[Member]:
    with members(1, Trainer) as [trainer]:
        yield trainer


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_published_weights_are_equal_on_all_engines_and_are_what_samples(engines, loop, trainer, directory, backend):
    async def body() -> None:
        ends = await joined(trainer, engines, directory / "0.safetensors", backend)
        seen = set()
        async with traffic(engines):
            for version in range(1, 6):
                await publish(trainer, engines, ends, version, directory / f"{version % NUM_VERSIONS}.safetensors")
                [digest] = await digests(engines)
                seen.add(digest)
        assert len(seen) == NUM_VERSIONS
        await assert_computes_with(engines[0], 1)
        trainer.do("leave")

    loop(body())


@pytest.mark.soak  # by default shards are published to the torch engine: test_shards
def test_weights_published_from_shards_are_equal_on_all_engines_and_are_what_samples(engines, loop, directory):
    async def body(ranks: list[Member]) -> None:
        files = [str(directory / f"{version}.safetensors") for version in range(NUM_VERSIONS)]
        take(ranks, files[0])
        ends, world_size = ends_of(engines, TIMEOUT_S), len(engines) + 1
        address, manifest = ranks[0].do("host", world_size, "ipc", TIMEOUT_S)
        ranks[0].start("accept")
        joins = (end.join(address, rank, world_size, "ipc", manifest) for rank, end in enumerate(ends, start=1))
        await asyncio.gather(*joins)
        assert ranks[0].result() is None
        async with traffic(engines):
            for version in range(1, NUM_VERSIONS):
                take(ranks, files[version])
                ranks[1].start("give", TIMEOUT_S)
                ranks[0].start("send", version)
                await asyncio.gather(*(end.receive(version, 0) for end in ends))
                assert [rank.result() for rank in ranks] == ["", True]
                await asyncio.gather(*(engine.load_weights(version, None) for engine in engines))
                assert len(await digests(engines)) == 1
        for engine in engines:
            await assert_computes_with(engine, NUM_VERSIONS - 1)

    with shards_of(2) as ranks:
        loop(body(ranks))


def test_tokens_sampled_while_versions_arrive_carry_their_versions_in_order(engines, loop, trainer, directory):
    async def body() -> list[Sample]:
        ends = await joined(trainer, engines, directory / "0.safetensors")
        async with traffic(engines) as flows:
            for version in (11, 12, 13):
                await publish(trainer, engines, ends, version, directory / f"{version % 10}.safetensors")
        trainer.do("leave")
        return [sample for flow in flows for sample in flow.samples]

    samples = loop(body())
    found = [[version for version, _ in sample.versions] for sample in samples]
    assert all(versions == sorted(versions) for versions in found)
    assert any(len(versions) > 1 for versions in found)
    assert {versions[-1] for versions in found} >= {13}


@pytest.mark.parametrize(
    ("end", "backend"),
    [
        ("fall_silent", "ipc"),
        ("die", "gloo"),
        pytest.param("fall_silent", "gloo", marks=pytest.mark.soak),
        pytest.param("die", "ipc", marks=pytest.mark.soak),
    ],
)
def test_without_the_trainer_generation_continues_and_a_new_group_works(engines, loop, directory, end, backend):
    async def body() -> None:
        before = await digests(engines)
        with members(1, Trainer) as [trainer]:
            ends = await joined(trainer, engines, directory / "0.safetensors", backend, SHORT_TIMEOUT_S)
            async with traffic(engines):
                trainer.start(end, 21)
                arriving = [asyncio.ensure_future(an_end.receive(21, 0)) for an_end in ends]
                await asyncio.sleep(0)
                counts = [engine.gauges()["tokens"] for engine in engines]
                results = await asyncio.gather(*arriving, return_exceptions=True)
                assert [type(result) for result in results] == [WeightsError] * 2
                sampled = [engine.gauges()["tokens"] - count for engine, count in zip(engines, counts, strict=True)]
                assert end == "die" or min(sampled) > NUM_IN_FLIGHT, "tokens were sampled during the whole wait"
                assert await digests(engines) == before
        with members(1, Trainer) as [trainer]:
            ends = await joined(trainer, engines, directory / "0.safetensors", backend)
            await publish(trainer, engines, ends, 22, directory / "2.safetensors")
            await assert_computes_with(engines[1], 2)
            await publish(trainer, engines, ends, 23, directory / "3.safetensors")
            await assert_computes_with(engines[0], 3)
            trainer.do("leave")

    loop(body())


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("gap", "q_proj.weight of the model is missing"),
        ("misshapen", r"q_proj.weight has shape \(63, 64\), the model needs \(64, 64\)"),
        ("unknown", "unheard_of"),
    ],
)
def test_weights_of_another_model_are_refused_and_the_next_load_resumes(
    engines, loop, trainer, directory, file, problem
):
    engine = engines[:1]

    async def body() -> None:
        ends = await joined(trainer, engine, directory / f"{file}.safetensors")
        async with traffic(engine):
            with pytest.raises(WeightsError, match=problem):
                await publish(trainer, engine, ends, 31, directory / f"{file}.safetensors")
            trainer.do("leave")
            ends = await joined(trainer, engine, directory / "0.safetensors")
            await publish(trainer, engine, ends, 32, directory / "1.safetensors")
        await assert_computes_with(engine[0], 1)
        trainer.do("leave")

    loop(body())


@pytest.mark.soak
def test_a_tied_model_whose_file_also_holds_the_output_layer_takes_versions(loop, trainer, tmp_path):
    """vLLM's Qwen has no output layer of its own then, but the embedding under a second name."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    models = [random_model("qwen3", seed=version, **sizes) for version in range(2)]
    for version, model in enumerate(models):
        saved(model, tmp_path / str(version))
    weights = [load_file(tmp_path / str(version) / "model.safetensors") for version in range(2)]
    head = {"lm_head.weight": weights[0]["model.embed_tokens.weight"].clone()}
    save_file(weights[0] | head, tmp_path / "0" / "model.safetensors", metadata={"format": "pt"})
    engines = [engine_of(tmp_path / str(version)) for version in range(2)]  # the second had version 1 from the start

    async def body() -> None:
        ends = await joined(trainer, engines[:1], tmp_path / "1" / "model.safetensors")
        for version in (1, 2):  # twice the same: a load may leave a model that the next one fails in
            await publish(trainer, engines[:1], ends, version, tmp_path / "1" / "model.safetensors")
        assert len(await digests(engines)) == 1
        asked = request(12, [1, 2], max_tokens=40)
        for sample in await engines[0].generate(asked):
            assert largest_difference(models[1], asked, sample) < PARITY
        trainer.do("leave")

    try:
        for engine in engines:
            loop(engine.start())
        loop(body())
    finally:
        for engine in engines:
            loop(engine.stop())


@pytest.mark.soak
def test_an_engine_of_two_processes_receives_a_version_once_and_computes_with_it(loop, trainer, directory):
    engine = engine_of(directory / "checkpoint", num_processes=2)

    async def body() -> None:
        await engine.start()
        ends = await joined(trainer, [engine], directory / "0.safetensors", "ipc")
        memory = {answer for answer, _ in await engine.rpc("weights_memory")}
        assert len(memory) == 1
        assert "shared by the engine's processes" in memory.pop()
        async with traffic([engine]):
            for version in (1, 2, 3):
                await publish(trainer, [engine], ends, version, directory / f"{version}.safetensors")
        await assert_computes_with(engine, 3)
        trainer.start("die", 4)
        with pytest.raises(WeightsError):
            await ends[0].receive(4, 0)
        with pytest.raises(WeightsError, match="version 4 has not arrived here: nothing is staged"):
            await engine.load_weights(4, None)

    try:
        loop(body())
    finally:
        loop(engine.stop())


def test_a_version_that_has_not_arrived_is_not_loaded(engines, loop, trainer, directory):
    engine = engines[:1]

    async def body() -> None:
        ends = await joined(trainer, engine, directory / "0.safetensors")
        await publish(trainer, engine, ends, 41, directory / "1.safetensors")
        before = await digests(engine)
        with pytest.raises(WeightsError, match="version 42 has not arrived here: version 41 is staged"):
            await engine[0].load_weights(42, None)
        assert await digests(engine) == before
        await engine[0].load_weights(41, None)
        await assert_computes_with(engine[0], 1)
        trainer.do("leave")

    loop(body())


def test_an_engine_sends_what_it_has_received_to_another_one_while_both_generate(engines, loop, trainer, directory):
    async def receive(newcomer: EngineReceiver, address: str, manifest: Manifest) -> None:
        await newcomer.join(address, 1, 2, "ipc", manifest)
        await newcomer.receive(51, 0)

    async def body() -> None:
        ends = await joined(trainer, engines[:1], directory / "0.safetensors", "ipc")
        await publish(trainer, engines[:1], ends, 51, directory / "2.safetensors")
        async with traffic(engines):
            address, manifest = await ends[0].host("127.0.0.1", "ipc")
            [newcomer] = ends_of(engines[1:], TIMEOUT_S)
            await asyncio.gather(ends[0].send(51, 0, 1 << 16), receive(newcomer, address, manifest))
            await engines[1].load_weights(51, None)
        assert len(await digests(engines)) == 1
        await assert_computes_with(engines[1], 2)
        await publish(trainer, engines[:1], ends, 52, directory / "3.safetensors")
        trainer.do("leave")

    loop(body())
