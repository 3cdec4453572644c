"""What the engine makes of outputs that come at an awkward moment, and of calls that fail. vLLM is a few lines here."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from asyncdapo.errors import EngineError
from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Request
from asyncdapo.rollout.vllm_engine.processes import Family
from asyncdapo.rollout.vllm_engine.vllm_engine import VllmEngine


class FakeVllm:
    """Its outputs are what the test puts into `outputs`, by request id; an abort puts the last one, as vLLM does."""

    vocab_size = 10

    def __init__(self) -> None:
        self.outputs: dict[str, asyncio.Queue] = {}
        self.salts: dict[str, int] = {}
        self.broken: set[str] = set()
        self.held_back: dict[str, list[int]] = {}

    async def begin(self, version: int) -> None:
        pass

    def params(self, sampling: Sampling, seed: int | None = None) -> None:
        pass

    def put(self, request_id: str, token_ids: list[int], finish_reason: str | None = None) -> None:
        logprobs = SimpleNamespace(logprobs=[-float(token) for token in token_ids])
        completion = SimpleNamespace(token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason)
        self.outputs[request_id].put_nowait(SimpleNamespace(outputs=[completion], num_cached_tokens=0))

    async def generate(self, prompt_ids, params, request_id, *, salt, priority):
        self.salts[request_id] = salt
        queue = self.outputs[request_id] = asyncio.Queue()
        while True:
            output = await queue.get()
            yield output
            if output.outputs[0].finish_reason:
                return

    async def abort(self, request_ids) -> None:
        for request_id in list(request_ids):
            self.put(request_id, self.held_back.pop(request_id, []), "abort")

    async def pause(self, *, recompute: bool) -> None:
        self._check("pause")

    async def resume(self) -> None:
        self._check("resume")

    async def load(self, version: int) -> None:
        pass

    def shut_down(self) -> None:
        pass

    def _check(self, what: str) -> None:
        if what in self.broken:
            raise EngineError(f"{what} failed")


@pytest.fixture
def vllm(monkeypatch):
    fake = FakeVllm()
    monkeypatch.setattr(VllmEngine, "_make", lambda self: (fake, Family([])))
    return fake


async def started() -> VllmEngine:
    config = RolloutConfig(engine="vllm", slots=2, max_response_length=8)
    engine = VllmEngine("none", config, max_prompt_length=8, transfer="none", worker_extension="none")
    await engine.start()
    return engine


async def turns() -> None:
    """Let every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_tokens_that_come_just_before_a_load_aborts_their_sample_go_with_it(vllm):
    async def use():
        engine = await started()
        asked = Request(prompt_ids=[1, 2], seeds=[1], sampling=Sampling(max_tokens=8))
        task = asyncio.create_task(engine.generate(asked))
        await turns()
        loading = asyncio.create_task(engine.load_weights(1, None))
        vllm.put("0", [5])  # handed out by vLLM, but not yet taken when the load looks who has no token
        await asyncio.sleep(0)
        vllm.put("0", [], "abort")
        await loading
        await turns()
        running = asked.num_running
        vllm.put("1", [6])
        vllm.put("1", [7], "stop")
        [sample] = await task
        await engine.stop()
        return asked, running, sample

    asked, running, sample = asyncio.run(use())
    assert (sample.token_ids.tolist(), sample.logprobs.tolist()) == ([6, 7], [-6.0, -7.0])
    assert sample.versions == [(1, 2)]
    assert vllm.salts == {"0": 0, "1": 1}
    assert (running, asked.num_running) == (0, 0)


def test_a_request_that_is_handed_back_has_all_tokens_of_its_sequences(vllm):
    async def use():
        engine = await started()
        asked = Request(prompt_ids=[1, 2], seeds=[1, 2], sampling=Sampling(max_tokens=8))
        task = asyncio.create_task(engine.generate(asked))
        await turns()
        vllm.put("0", [5])
        await turns()
        vllm.held_back["0"] = [6, 7]
        running = await engine.so_far(asked)
        asked.handed_back = True
        ended = await engine.so_far(asked)
        await turns()
        task.cancel()
        await asyncio.wait([task])
        await engine.stop()
        return asked, *([one.token_ids.tolist() for one in found] for found in (running, ended))

    asked, running, ended = asyncio.run(use())
    assert (running, ended, asked.num_sampled) == ([[5], []], [[5, 6, 7], []], 3)
    assert list(vllm.salts) == ["0", "1"], "nothing is requested again"


@pytest.mark.parametrize("call", ["pause", "resume"])
def test_an_engine_that_can_not_pause_or_continue_counts_as_failed(vllm, call):
    async def use():
        engine = await started()
        vllm.broken.add(call)
        with pytest.raises(EngineError, match=f"{call} failed"):
            await engine.load_weights(1, None)
        vllm.broken.clear()
        await engine.stop()

    asyncio.run(use())
