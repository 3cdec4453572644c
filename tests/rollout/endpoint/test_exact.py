"""The torch engine behind the endpoint: log-probs of episodes that part, with an update between their calls, against
those of Hugging Face with the weights of the recorded versions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncdapo.messages import Score
from asyncdapo.model.files import TokenizerFiles
from asyncdapo.model.tokenizer import load_tokenizer
from asyncdapo.model.turn_encoder import turn_encoder
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.endpoint.chat import Chat
from asyncdapo.rollout.endpoint.endpoint import Endpoint
from asyncdapo.rollout.episodes import Episode
from asyncdapo.rollout.groups import build_group
from asyncdapo.rollout.torch_engine.torch_engine import TorchEngine
from tests.asynchronous import until
from tests.controller.recomputed import recomputed
from tests.controller.runs import START_MODEL
from tests.rollout.endpoint.calling import Called, make_attempt
from tests.rollout.fakes import make_lease

NUM_EPISODES = 200
TOLERANCE = 1e-3


async def episode(endpoint: Endpoint, engine: TorchEngine, seed: int, updated: asyncio.Event) -> Episode:
    """A question; two at the same time behind its answer, and one without it, after the update."""
    attempt = make_attempt(engine, seed=seed, max_tokens=120)
    async with endpoint.session(attempt, lambda _: None) as key:
        it = Called(endpoint, attempt, key, [])

        async def say(*texts: str) -> str:
            roles = ("user", "assistant")
            messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
            status, answer = await it.post({"messages": messages, "max_tokens": 30}, "/v1/chat/completions")
            assert status == 200, answer
            return answer["choices"][0]["message"]["content"]

        question = f"Q: {seed % 9}*{seed % 7}\n"
        said = await say(question)
        await updated.wait()
        await asyncio.gather(say(question, said, "Q: 7*6\n"), say(question, said, "Q: 3*4\n"))
        await say("Q: 2*2\n")
    return attempt.episode("stop", 0.0, {})


async def sample(tensors: dict[str, torch.Tensor]) -> list[Episode]:
    """All episodes. These weights come when some have their first answer."""
    tokenizer = load_tokenizer(TokenizerFiles(str(START_MODEL)))
    encoder = turn_encoder(tokenizer, chat_template=False, system_prompt=None, joins=True)
    config = RolloutConfig(slots=64, max_response_length=120, on_update="recompute")
    engine = TorchEngine(str(START_MODEL), config, max_prompt_length=249, max_context=250)
    endpoint, updated = Endpoint(250, lambda: Chat(encoder, tokenizer)), asyncio.Event()
    await asyncio.gather(engine.start(), endpoint.start())
    episodes = [asyncio.create_task(episode(endpoint, engine, seed, updated)) for seed in range(NUM_EPISODES)]
    await until(lambda: endpoint.gauges()["endpoint_calls"] and engine.gauges()["tokens"] > 1000)
    await engine.load_weights(1, tensors)
    updated.set()
    made = await asyncio.gather(*episodes)
    await asyncio.gather(engine.stop(), endpoint.stop())
    return made


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many short forward passes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.soak
def test_logprobs_are_those_of_the_recorded_versions_and_of_no_other() -> None:
    models = [AutoModelForCausalLM.from_pretrained(START_MODEL, dtype=torch.float32) for _ in range(2)]
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in models[1].parameters():
            if weight.ndim > 1:
                weight += 0.05 * weight.std() * torch.randn_like(weight)
    tensors = {name: value.clone() for name, value in models[1].state_dict().items() if name != "lm_head.weight"}
    made = asyncio.run(sample(tensors))
    scores = [Score(reward=0, metrics={})] * NUM_EPISODES
    group, payload = build_group(make_lease(7, group_size=NUM_EPISODES), 0, made, scores, 0.1)
    assert [len(completion.contexts) for completion in group.completions] == [3] * NUM_EPISODES
    num_spanning = num_apart = 0
    for one in payload.of_contexts(group):
        behind = one.response
        sampled = one.is_sampled[behind]
        table = np.stack([recomputed(model, one.prompt_ids, one.own_ids[behind])[sampled] for model in models])
        versions = np.repeat(*np.array(one.header.versions).T)
        at = np.arange(len(versions))
        assert np.abs(table[versions, at] - one.logprobs_S).max() < TOLERANCE
        num_spanning += len(one.header.versions) > 1
        num_apart += np.abs(table[1 - versions, at] - one.logprobs_S).max() > TOLERANCE
    print(f"{num_spanning} contexts span both versions, {num_apart} of {3 * NUM_EPISODES} fit no other")
    assert num_spanning > NUM_EPISODES / 4
    assert num_apart > 2.5 * NUM_EPISODES
