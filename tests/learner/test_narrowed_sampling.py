"""Training on draws of top-p and top-k: with the weights that sampled, every ratio is 1."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from asyncdapo.eval_messages import Sampling
from asyncdapo.learner.config import LossConfig
from asyncdapo.messages import Lease, Prompt, Score
from asyncdapo.records.record import read_record
from asyncdapo.replay.ledger.payloads import Segments
from asyncdapo.rollout.engine import Request
from asyncdapo.rollout.episodes import Episode, SampledContext, turn_of
from asyncdapo.rollout.groups import build_group
from tests.learner.tiny import VOCAB_SIZE, batch_of, make_learner, save_tiny_llama, train
from tests.payloads import joined
from tests.rollout.torch_engine.models import engine_for

TEMPERATURE = 0.8


async def sampled_groups(path, sampling):
    """Three groups of four, as a worker sends them."""
    engine = engine_for(path, slots=12, stop=[1])
    await engine.start()
    rng, groups = np.random.default_rng(0), []
    for prompt_id in range(3):
        token_ids = rng.integers(2, VOCAB_SIZE, 5).tolist()
        prompt = Prompt(prompt_id=prompt_id, epoch=0, source="made", row=0, token_ids=token_ids, answer="")
        request = Request(prompt_ids=token_ids, seeds=list(range(4)), sampling=sampling)
        samples = await engine.generate(request)
        contexts = [SampledContext(turns=[turn_of(request.prompt_ids, sample, 0)]) for sample in samples]
        episodes = [Episode(contexts=[context], finish_reason="stop") for context in contexts]
        scores = [Score(reward=float(number % 2), metrics={}) for number in range(4)]
        lease = Lease(lease_id=prompt_id, branch=0, attempt=0, group_size=4, seed=0, prompt=prompt)
        groups.append(build_group(lease, 0, episodes, scores, 0.0))
    await engine.stop()
    return groups


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(anchor="proximal", outlier_band=(0.99, 1.01))])
@pytest.mark.parametrize("limits", [{"top_p": 0.6}, {"top_k": 4, "top_p": 0.9}], ids=["top-p", "top-k and top-p"])
def test_with_equal_weights_the_ratio_of_a_narrowed_draw_is_one_behind_the_ledger(path, tmp_path, limits, loss):
    groups = asyncio.run(sampled_groups(path, Sampling(temperature=TEMPERATURE, max_tokens=12, **limits)))
    segments = Segments(tmp_path)
    kept = [read_record(tmp_path, group.lease_id, segments.append(group, payload)) for group, payload in groups]
    payload = joined([payload for _, payload in kept])
    batch = batch_of([group for group, _ in kept])
    options = {"temperature": TEMPERATURE, "loss": loss, "tokens_per_microbatch": 64}
    metrics = train(make_learner(path, **options), batch, payload)
    assert metrics["learner/ratio_p01"] == pytest.approx(1, abs=1e-3)
    assert metrics["learner/ratio_p99"] == pytest.approx(1, abs=1e-3)
    assert metrics["learner/k3"] < 1e-8
    without = train(make_learner(path, **options | {"loss": LossConfig()}), batch, replace(payload, support=None))
    assert without["learner/k3"] > 0.01
