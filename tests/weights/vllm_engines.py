"""Engines of vLLM for tests of weights on their way: a tiny tied model in several versions, requests that are always in
flight, a learner's process (`trainers.Trainer`) that sends to them. The model is tied, since what vLLM has derived from
the embedding for the output projection has to change with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Sample
from asyncdapo.rollout.vllm_engine.vllm_engine import VllmEngine
from asyncdapo.transport.backend import Backend
from asyncdapo.weights.receivers import TRANSFER, WORKER_RECEIVER, EngineReceiver
from tests.rollout.torch_engine.models import largest_difference, random_model, request
from tests.weights.members import Failed, Member

PARITY = 1e-3
TIMEOUT_S = 20.0
NUM_VERSIONS = 4
NUM_IN_FLIGHT = 8
RESPONSE_LENGTH = 100


def model_of(version: int) -> torch.nn.Module:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return random_model("llama", seed=version, tie_word_embeddings=True, **sizes)


def tensors_of(version: int) -> dict[str, torch.Tensor]:
    """As a learner names them, tied ones once."""
    return {name: weight.detach() for name, weight in model_of(version).named_parameters()}


def engine_of(path: Path, num_processes: int = 1) -> VllmEngine:
    sizes = {"slots": NUM_IN_FLIGHT, "max_response_length": RESPONSE_LENGTH}
    config = RolloutConfig(engine="vllm", tensor_parallel=num_processes, **sizes)
    return VllmEngine(
        str(path),
        config,
        max_prompt_length=16,
        transfer=TRANSFER,
        worker_extension=WORKER_RECEIVER,
        stop_token_ids=[],
    )


class Traffic:
    """Requests that are always in flight: whenever one has finished, the next begins."""

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine
        self.samples: list[Sample] = []
        self._stopping = False
        self._tasks = [asyncio.ensure_future(self._ask(number)) for number in range(NUM_IN_FLIGHT)]

    async def _ask(self, number: int) -> None:
        while not self._stopping:
            asked = request(9, [number], number, max_tokens=RESPONSE_LENGTH)
            self.samples += await self.engine.generate(asked)

    async def finish(self) -> list[Sample]:
        """All that was sampled, the last ones to their ends."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        return self.samples


@asynccontextmanager
async def traffic(engines: list[VllmEngine]) -> AsyncIterator[list[Traffic]]:
    yield (flows := [Traffic(engine) for engine in engines])
    for flow in flows:
        samples = await flow.finish()
        assert {len(sample.token_ids) for sample in samples} == {RESPONSE_LENGTH}


def ends_of(engines: list[VllmEngine], timeout_s: float) -> list[EngineReceiver]:
    return [EngineReceiver(engine.rpc, timeout_s) for engine in engines]


async def joined(
    trainer: Member, engines: list[VllmEngine], weights: Path, backend: Backend = "gloo", timeout_s: float = TIMEOUT_S
) -> list[EngineReceiver]:
    """Ends that are in a group with the trainer."""
    ends, world_size = ends_of(engines, timeout_s), len(engines) + 1
    address, manifest = trainer.do("host", world_size, backend, TIMEOUT_S, str(weights))
    trainer.start("accept")
    await asyncio.gather(
        *(end.join(address, rank, world_size, backend, manifest) for rank, end in enumerate(ends, start=1))
    )
    assert trainer.result() is None
    return ends


async def publish(
    trainer: Member, engines: list[VllmEngine], ends: list[EngineReceiver], version: int, file: Path
) -> None:
    trainer.start("send", version, str(file))
    await asyncio.gather(*(end.receive(version, 0) for end in ends))
    assert not isinstance(trainer.result(), Failed)
    await asyncio.gather(*(engine.load_weights(version, None) for engine in engines))


async def digests(engines: list[VllmEngine]) -> set[str]:
    """Of all engines' weights: one where they are equal."""
    return {digest for engine in engines for digest in await engine.rpc("weights_digest")}


async def assert_computes_with(engine: VllmEngine, version: int) -> None:
    asked = request(12, [1, 2], max_tokens=40)
    samples = await engine.generate(asked)
    assert max(largest_difference(model_of(version), asked, sample) for sample in samples) < PARITY
