"""Log-probs of sampled tokens are those of the Hugging Face forward pass."""

import asyncio
import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.learner.tiny import make_learner

from .models import SHAPES, VOCAB_SIZE, engine_for, largest_difference, logprobs_of, random_model, request, saved


async def generate(path, requests, **options):
    engine = engine_for(path, **options)
    await engine.start()
    samples = await asyncio.gather(*(engine.generate(asked) for asked in requests))
    await engine.stop()
    return samples


def mixed_requests(temperature=1.0):
    """37 samples of 13 prompts, from 1 to 32 tokens long, for 4 slots."""
    return [
        request(length, range(length, length + 1 + length % 5), temperature=temperature, max_tokens=8 + 3 * length % 29)
        for length in (1, 2, 31, 5, 17, 3, 32, 8, 9, 12, 24, 1, 6)
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_of_every_sampled_token_match_the_full_forward_pass(shape, tmp_path):
    model = random_model(shape)
    requests = mixed_requests()
    results = asyncio.run(generate(saved(model, tmp_path), requests))
    pairs = [(asked, sample) for asked, samples in zip(requests, results, strict=True) for sample in samples]
    entropy = torch.cat([logprobs_of(model, asked, sample)[1] for asked, sample in pairs]).mean().item()
    assert entropy < math.log(VOCAB_SIZE) / 2
    assert max(largest_difference(model, asked, sample) for asked, sample in pairs) < 1e-4


@pytest.mark.parametrize("shape", ["llama", "qwen2.5", "qwen3"])
def test_the_comparison_sees_positions_off_by_one_and_another_rope_theta(shape, tmp_path):
    model = random_model(shape)
    asked = request(17, range(4), max_tokens=24)
    [samples] = asyncio.run(generate(saved(model, tmp_path), [asked]))
    config = copy.deepcopy(model.config)
    config.rope_parameters = config.rope_parameters | {"rope_theta": 1.5 * config.rope_parameters["rope_theta"]}
    other_theta = type(model)._from_config(config, attn_implementation="eager").eval()
    other_theta.load_state_dict(model.state_dict())
    for sample in samples:
        assert largest_difference(model, asked, sample) < 1e-4
        assert largest_difference(model, asked, sample, response_shift=1) > 1e-2
        assert largest_difference(other_theta, asked, sample) > 1e-2


def test_logprobs_are_taken_at_the_sampling_temperature(tmp_path):
    model = random_model()
    requests = mixed_requests(temperature=0.7)
    results = asyncio.run(generate(saved(model, tmp_path), requests))
    for asked, samples in zip(requests, results, strict=True):
        assert max(largest_difference(model, asked, sample) for sample in samples) < 1e-4


def test_narrowed_draws_have_the_log_probs_that_the_learner_has_over_the_same_tokens(tmp_path):
    """Beside others in the same slots; those over the whole vocabulary are others."""
    limits = ({"top_k": 3}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.8}, {})
    requests = [request(length, range(3), temperature=0.7, **limit) for length, limit in enumerate(limits, start=4)]
    path = saved(random_model("qwen2.5"), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    results = asyncio.run(generate(path, requests))
    found = [(asked, sample) for asked, samples in zip(requests, results, strict=True) for sample in samples]
    assert [sample.support is None for _, sample in found] == [False] * 9 + [True] * 3
    assert all(sample.support.counts.max() <= 3 for _, sample in found[:3])
    assert not any(sample.support.problem(sample.token_ids) for _, sample in found[:9])
    learner = make_learner(path, temperature=0.7)
    triples = [(asked.prompt_ids, sample.token_ids, sample.support) for asked, sample in found]
    over_support = np.concatenate(learner.logprobs(0, triples))
    over_all = np.concatenate(learner.logprobs(0, [(prompt, response, None) for prompt, response, _ in triples]))
    of_engine = np.concatenate([sample.logprobs for _, sample in found])
    assert np.abs(of_engine - over_support).max() < 1e-4
    assert np.abs(of_engine - over_all).max() > 0.1


def test_long_and_short_sequences_side_by_side_in_many_slots_match(tmp_path):
    """More slots than one block of the cache, refilled while others are far ahead."""
    model = random_model()
    requests = [request(1 + at % 30, range(3), at, max_tokens=1 + 13 * at % 96) for at in range(40)]
    path = saved(model, tmp_path)
    results = asyncio.run(generate(path, requests, slots=40, max_response_length=96))
    for asked, samples in zip(requests, results, strict=True):
        assert max(largest_difference(model, asked, sample) for sample in samples) < 1e-4


def test_a_sharded_checkpoint_in_bfloat16_matches_its_float32_forward(tmp_path):
    path = saved(random_model("qwen3").to(torch.bfloat16), tmp_path, max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    requests = mixed_requests()
    results = asyncio.run(generate(path, requests))
    for asked, samples in zip(requests, results, strict=True):
        assert max(largest_difference(model, asked, sample) for sample in samples) < 1e-4


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.05), ("float16", 0.00625)])
def test_two_bytes_compute_close_to_four(tmp_path, dtype, error):
    model = random_model("qwen2.5")
    requests = mixed_requests()
    results = asyncio.run(generate(saved(model, tmp_path), requests, dtype=dtype))
    differences = [
        (logprobs_of(model, asked, sample)[0] - torch.from_numpy(sample.logprobs)).abs()
        for asked, samples in zip(requests, results, strict=True)
        for sample in samples
    ]
    assert torch.cat(differences).median().item() < error


def test_greedy_tokens_are_those_of_hugging_face_and_their_logprobs_have_temperature_one(tmp_path):
    model = random_model("qwen2.5")
    requests = [request(length, [0], temperature=0.0, max_tokens=24) for length in (3, 11, 20, 32)]
    results = asyncio.run(generate(saved(model, tmp_path), requests))
    for asked, [sample] in zip(requests, results, strict=True):
        expected = model.generate(torch.tensor([asked.prompt_ids]), do_sample=False, max_new_tokens=24)
        assert sample.token_ids.tolist() == expected[0, len(asked.prompt_ids) :].tolist()
        assert largest_difference(model, asked, sample) < 1e-4


@pytest.mark.soak
def test_engine_and_learner_agree_better_in_float16_than_in_bfloat16(tmp_path, capsys):
    path = saved(random_model("qwen2.5"), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    requests = [request(length, range(8), max_tokens=40) for length in (3, 7, 12, 20, 31)]
    means = {}
    for dtype in ("float32", "bfloat16", "float16"):
        results = asyncio.run(generate(path, requests, dtype=dtype, slots=16))
        found = [(asked, sample) for asked, samples in zip(requests, results, strict=True) for sample in samples]
        pairs = [(asked.prompt_ids, sample.token_ids, None) for asked, sample in found]
        of_learner = np.concatenate(make_learner(path, dtype=dtype).logprobs(0, pairs))
        apart = np.abs(np.concatenate([sample.logprobs for _, sample in found]) - of_learner)
        means[dtype] = apart.mean()
        with capsys.disabled():
            print(f"{dtype}: mean {apart.mean():.1e}, p99 {np.quantile(apart, 0.99):.1e}, max {apart.max():.1e}")
    assert means["float32"] < 1e-4 < means["float16"] < means["bfloat16"] / 4
