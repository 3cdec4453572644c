"""New weights between two tokens: which token was sampled with which, and what becomes of the cache."""

import asyncio
import itertools
import shutil

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from asyncdapo.errors import WeightsError

from .models import engine_for, generate_through_updates, largest_difference, logprobs_of, random_model, request, saved

LENGTH = 120


@pytest.fixture(scope="module")
def models():
    return [random_model("qwen3", seed) for seed in range(3)]


def labels(sample):
    return np.repeat([version for version, _ in sample.versions], [count for _, count in sample.versions])


def pairs(requests, results):
    return [(asked, sample) for asked, samples in zip(requests, results, strict=True) for sample in samples]


@pytest.mark.parametrize("slots", [6, 40])
def test_under_recompute_every_token_matches_the_weights_of_its_version_and_no_other(models, tmp_path, slots):
    requests = [request(length, range(8), max_tokens=LENGTH) for length in (3, 17, 32)]
    results = generate_through_updates(models, tmp_path, requests, slots=slots, on_update="recompute")
    seen = set()
    for asked, sample in pairs(requests, results):
        versions = labels(sample)
        assert len(versions) == len(sample.token_ids)
        seen.add(tuple(version for version, _ in sample.versions))
        for version, model in enumerate(models):
            difference = abs(logprobs_of(model, asked, sample)[0].numpy() - sample.logprobs)
            if (versions == version).any():
                assert difference[versions == version].max() < 1e-4
            if (versions != version).any():
                assert difference[versions != version].max() > 1e-2
    assert seen == ({(0, 1, 2)} if slots == 40 else {(0,), (0, 1), (1, 2), (2,)})


@torch.no_grad()
def logprobs_with_kept_cache(models, asked, sample):
    """Each run of tokens with its own weights, on the keys and values that the weights before it left."""
    ids = torch.tensor([[*asked.prompt_ids, *sample.token_ids.tolist()]])
    cache, start, logits = DynamicCache(), 0, []
    for number, (version, count) in enumerate(sample.versions):
        end = start + count + (len(asked.prompt_ids) - 1 if number == 0 else 0)
        logits.append(models[version](ids[:, start:end], past_key_values=cache, use_cache=True).logits[0])
        start = end
    logprobs = torch.cat(logits)[len(asked.prompt_ids) - 1 :].log_softmax(-1)
    return logprobs.gather(1, ids[0, len(asked.prompt_ids) :, None])[:, 0].numpy()


def test_under_keep_older_keys_and_values_stay_in_use(models, tmp_path):
    requests = [request(length, range(4), max_tokens=LENGTH) for length in (3, 17)]
    results = generate_through_updates(models, tmp_path, requests, slots=8, on_update="keep")
    for asked, sample in pairs(requests, results):
        assert [version for version, _ in sample.versions] == [0, 1, 2]
        assert abs(logprobs_with_kept_cache(models, asked, sample) - sample.logprobs).max() < 1e-4
        assert largest_difference(models[2], asked, sample) > 1e-2


@pytest.mark.parametrize("num_requests", [1, 24])
def test_samples_that_start_after_an_update_have_a_prompt_prefill_of_their_own(models, tmp_path, num_requests):
    """One prompt, few slots: its later samples see nothing of the weights that were there before."""
    seeds = np.split(np.arange(24), num_requests)
    requests = [request(32, some.tolist(), max_tokens=40) for some in seeds]
    results = generate_through_updates(models, tmp_path, requests, slots=4, on_update="keep")
    whole = {}
    for sample in itertools.chain(*results):
        if len(sample.versions) == 1:
            [(version, _)] = sample.versions
            whole[version] = sample
            assert largest_difference(models[version], requests[0], sample) < 1e-4
    assert set(whole) == {0, 1, 2}


def test_weights_that_are_not_this_models_are_refused_and_the_old_ones_stay(models, tmp_path):
    async def main():
        engine = engine_for(saved(models[0], tmp_path))
        await engine.start()
        with pytest.raises(WeightsError, match="version 1 can't be loaded: model.norm.weight is missing"):
            await engine.load_weights(1, {"model.embed_tokens.weight": models[1].model.embed_tokens.weight.data})
        assert engine.loaded_version == 0
        asked = request(8, [0])
        before = await engine.generate(asked)
        await engine.load_weights(2, models[2].state_dict())
        after = await engine.generate(asked)
        await engine.stop()
        return asked, before[0], after[0]

    asked, before, after = asyncio.run(main())
    assert before.versions == [(0, 24)]
    assert largest_difference(models[0], asked, before) < 1e-4
    assert after.versions == [(2, 24)]
    assert largest_difference(models[2], asked, after) < 1e-4


def test_weights_come_while_the_engine_generates_and_no_weight_file_is_opened_again(models, tmp_path):
    asked = request(17, range(6), max_tokens=4000)

    async def main():
        path = saved(models[0], tmp_path / "model")
        engine = engine_for(path, slots=6, max_response_length=4000, on_update="recompute")
        await engine.start()
        shutil.rmtree(path)
        task = asyncio.create_task(engine.generate(asked))
        for version in (1, 2):
            before = asked.num_sampled
            while asked.num_sampled < before + 60:
                await asyncio.sleep(0.0005)
            await engine.load_weights(
                version, {name: tensor.clone() for name, tensor in models[version].state_dict().items()}
            )
            assert engine.loaded_version == version
        while asked.num_sampled < before + 200:
            await asyncio.sleep(0.0005)
        assert not task.done()
        task.cancel()
        [after] = await engine.generate(request(8, [0]))
        await engine.stop()
        return after

    after = asyncio.run(asyncio.wait_for(main(), 60))
    assert after.versions == [(2, 24)]
    assert largest_difference(models[2], request(8, [0]), after) < 1e-4


def test_a_cancelled_load_is_either_whole_or_not_at_all(models, tmp_path):
    """Cancelled at many moments of a load, the next load follows at once; every token has its version's weights."""
    asked = request(8, range(64), max_tokens=400)

    async def main():
        engine = engine_for(saved(models[0], tmp_path), slots=64, max_response_length=400, on_update="recompute")
        await engine.start()
        task = asyncio.create_task(engine.generate(asked))
        while not asked.num_sampled:
            await asyncio.sleep(0.0005)
        for version in range(1, 24, 2):
            cancelled = asyncio.create_task(engine.load_weights(version, models[version % 3].state_dict()))
            await asyncio.sleep(0.0002 * version)
            cancelled.cancel()
            await engine.load_weights(version + 1, models[(version + 1) % 3].state_dict())
        samples = await task
        await engine.stop()
        return samples

    for sample in asyncio.run(asyncio.wait_for(main(), 60))[:16]:
        versions = labels(sample)
        assert len(sample.versions) > 1
        for number, model in enumerate(models):
            mine = versions % 3 == number
            if mine.any():
                difference = abs(logprobs_of(model, asked, sample)[0].numpy() - sample.logprobs)
                assert difference[mine].max() < 1e-4
