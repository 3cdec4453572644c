"""`rollout.deterministic`: tokens and log-probs to the last bit from weights, prompt and seed alone."""

import asyncio

import numpy as np
import pytest

from .models import engine_for, generate_through_updates, largest_difference, logprobs_of, random_model, request, saved


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return saved(random_model(), tmp_path_factory.mktemp("model"))


def generate(path, asked, *, before=(), beside=(), **options):
    """Samples of `asked`; requests `before` have ended by then, those `beside` it were handed in earlier."""

    async def main():
        engine = engine_for(path, slots=8, deterministic=True, stop=[3], **options)
        await engine.start()
        for other in before:
            await engine.generate(other)
        others = [asyncio.create_task(engine.generate(other)) for other in beside]
        await asyncio.sleep(0)
        samples = await engine.generate(asked)
        await asyncio.gather(*others)
        await engine.stop()
        return samples

    return asyncio.run(asyncio.wait_for(main(), 60))


def identical(one, other):
    return all(
        np.array_equal(a.token_ids, b.token_ids)
        and np.array_equal(a.logprobs.view(np.int32), b.logprobs.view(np.int32))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("num_samples", [3, 8, 13])
def test_samples_are_bit_identical_whatever_was_generated_before_or_beside(path, num_samples):
    asked = request(9, range(num_samples))
    others = [request(length, range(length % 11 + 1), length) for length in (1, 32, 5, 20)]
    alone = generate(path, asked)
    assert identical(alone, generate(path, asked, before=others))
    assert identical(alone, generate(path, asked, beside=others))


def test_a_sample_does_not_depend_on_the_other_seeds_of_its_request(tmp_path):
    # Others stop at other times, so the number of running sequences differs from step to step. Matrices of this size
    # are multiplied in another order when it does.
    path = saved(random_model(hidden_size=128, intermediate_size=384), tmp_path)
    first, *rest = (
        generate(path, request(9, [5, *range(other, other + 7)], max_tokens=96), max_response_length=96)
        for other in (100, 200, 300, 400)
    )
    assert len(first[0].token_ids) == 96
    for samples in rest:
        assert [len(sample.token_ids) for sample in samples] != [len(sample.token_ids) for sample in first]
        assert identical(samples[:1], first[:1])


def test_deterministic_samples_match_the_model_like_all_others(path):
    model, asked = random_model(), request(9, range(8))
    for sample in generate(path, asked):
        assert largest_difference(model, asked, sample) < 1e-4


def test_a_cache_that_is_recomputed_in_deterministic_mode_matches_the_new_weights(tmp_path):
    models, asked = [random_model(seed=seed) for seed in range(2)], request(9, range(6), max_tokens=80)
    [samples] = generate_through_updates(models, tmp_path, [asked], slots=8, deterministic=True, on_update="recompute")
    for sample in samples:
        (_, num_old), (version, _) = sample.versions
        assert version == 1
        difference = abs(logprobs_of(models[1], asked, sample)[0].numpy() - sample.logprobs)
        assert difference[num_old:].max() < 1e-4
        assert difference[:num_old].max() > 1e-2
