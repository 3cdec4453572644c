"""The engine as a rollout worker sees it: samples, seeds, ends, withdrawal, refusals, failures."""

import asyncio
import dataclasses
import time

import msgspec
import numpy as np
import pytest

from asyncdapo.errors import ConfigError, EngineError
from asyncdapo.rollout.engine import Priority

from .models import VOCAB_SIZE, engine_for, random_model, request, saved

LONG = 300


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return saved(random_model(), tmp_path_factory.mktemp("model"))


def running(path, use, **options):
    """What `use(engine)` returns, with an engine that runs meanwhile."""

    async def main():
        engine = engine_for(path, **options)
        await engine.start()
        try:
            return await asyncio.wait_for(use(engine), 60)
        finally:
            await engine.stop()

    return asyncio.run(main())


async def together(engine, *requests):
    return await asyncio.gather(*(engine.generate(asked) for asked in requests))


def same(one, other):
    return all(
        np.array_equal(a.token_ids, b.token_ids) and np.allclose(a.logprobs, b.logprobs, atol=1e-4)
        for a, b in zip(one, other, strict=True)
    )


def test_samples_come_in_the_order_of_their_seeds_and_depend_on_nothing_else(path):
    async def use(engine):
        [alone] = await together(engine, request(9, [5, 6, 7]))
        crowd = [request(length, range(4), length) for length in (2, 30, 11, 7)]
        reversed_seeds, *_ = await together(engine, request(9, [7, 6, 5]), *crowd)
        return alone, reversed_seeds

    alone, reversed_seeds = running(path, use)
    assert same(alone, reversed_seeds[::-1])
    assert len({tuple(sample.token_ids) for sample in alone}) == 3


def test_samples_do_not_depend_on_the_number_of_slots(path):
    requests = [request(length, range(5), length) for length in (4, 19)]
    few = running(path, lambda engine: together(engine, *requests), slots=2)
    many = running(path, lambda engine: together(engine, *requests), slots=40)
    assert all(same(a, b) for a, b in zip(few, many, strict=True))


def test_a_request_with_all_tokens_begins_beside_one_that_draws_from_a_few(path):
    few, others = request(9, [5], max_tokens=48, top_p=0.9), request(4, range(6), max_tokens=4)

    async def use(engine):
        return await together(engine, few, others)

    [among_few], among_all = running(path, use, slots=2)
    assert same([among_few], *running(path, lambda engine: together(engine, few)))
    assert len(among_few.support.counts) == len(among_few.token_ids)
    assert same(among_all, *running(path, lambda engine: together(engine, others)))
    assert all(sample.support is None for sample in among_all)


def test_sampled_tokens_follow_the_models_own_distribution(path):
    model = random_model()
    asked = request(12, range(4000), max_tokens=1)
    [samples] = running(path, lambda engine: together(engine, asked), slots=500)
    probs = np.zeros(VOCAB_SIZE)
    for sample in samples:
        probs[sample.token_ids[0]] += 1 / len(samples)
    logits = model(model.dummy_inputs["input_ids"].new_tensor([asked.prompt_ids])).logits[0, -1]
    assert abs(probs - logits.softmax(-1).detach().numpy()).max() < 0.03


def test_a_stop_token_ends_a_response_and_is_its_last_token(path):
    asked = request(6, range(30), max_tokens=48)
    [samples] = running(path, lambda engine: together(engine, asked), stop=[3, 8, 13])
    reasons = {sample.finish_reason for sample in samples}
    assert reasons == {"stop", "length"}
    for sample in samples:
        stops = np.isin(sample.token_ids, [3, 8, 13])
        assert not stops[:-1].any()
        assert stops[-1] == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.token_ids) == 48
        assert sample.token_ids.dtype == np.int32
        assert sample.logprobs.dtype == np.float32
        assert len(sample.logprobs) == len(sample.token_ids)


def test_the_checkpoints_own_stop_ids_are_the_default(tmp_path):
    path = saved(random_model(eos_token_id=[3, 8, 13]), tmp_path)

    async def use(engine):
        return await engine.generate(request(6, range(30), max_tokens=48))

    samples = running(path, use, stop=None)
    assert "stop" in {sample.finish_reason for sample in samples}
    assert same(samples, running(path, use, stop=[3, 8, 13]))


def test_each_request_has_its_own_sampling_parameters(path):
    plain, greedy = request(9, [1, 2]), request(9, [1, 2], temperature=0.0)
    narrow = request(9, [1, 2], top_k=1)

    async def use(engine):
        return await together(engine, plain, greedy, narrow)

    plain_samples, greedy_samples, narrow_samples = running(path, use, slots=8)
    assert same(greedy_samples[:1], greedy_samples[1:])
    for one, other in zip(narrow_samples, greedy_samples, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert not one.logprobs.any()  # one token alone was left to draw
    assert not np.array_equal(plain_samples[0].token_ids, greedy_samples[0].token_ids)


def test_urgent_requests_start_before_those_that_wait(path):
    order = []

    async def use(engine):
        requests = [request(4, [0], max_tokens=1000, prompt_seed=1)]
        requests += [request(4, [at], max_tokens=2) for at in range(3)]
        for name, asked in enumerate(requests):
            asked.on_started = lambda version, name=name: order.append(name)
        requests[-1].priority = Priority.PROBE
        await together(engine, *requests)

    running(path, use, slots=1, max_response_length=1000)
    assert order in ([0, 3, 1, 2], [3, 0, 1, 2])


def test_progress_and_counters_add_up(path):
    async def use(engine):
        requests = [request(length, range(3), length, max_tokens=200) for length in (4, 7, 12)]
        started, room = [], []
        for asked in requests:
            asked.on_started = started.append
            asked.on_sample_done = lambda: room.append(engine.num_outstanding)
        waiting = asyncio.gather(*(engine.generate(asked) for asked in requests))
        await asyncio.sleep(0)
        assert engine.num_outstanding == 9
        results = await waiting
        assert engine.num_outstanding == 0
        assert started == [0, 0, 0]
        assert len(room) == 9
        assert max(room) < 9
        assert [asked.num_sampled for asked in requests] == [3 * 200] * 3
        return results, engine.gauges()

    results, gauges = running(path, use, slots=4, max_response_length=200)
    assert gauges["tokens"] == sum(len(sample.token_ids) for samples in results for sample in samples)
    assert gauges["prefill_tokens"] == 4 + 7 + 12
    assert gauges["slot_steps"] == gauges["tokens"] - 9  # first tokens come from the prefill
    assert gauges["steps"] <= gauges["slot_steps"] <= 4 * gauges["steps"]


def test_an_idle_engine_uses_no_processor_time(path):
    async def use(engine):
        await together(engine, request(4, [0]))
        before = time.process_time()
        await asyncio.sleep(0.5)
        return time.process_time() - before

    assert running(path, use) < 0.03


def test_cancelling_a_request_frees_its_slots_for_others(path):
    async def use(engine):
        long = request(4, range(2), max_tokens=4000)
        task = asyncio.create_task(engine.generate(long))
        while not long.num_sampled:
            await asyncio.sleep(0.001)
        other = asyncio.create_task(engine.generate(request(5, range(2))))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.num_outstanding == 2
        await other
        sampled = long.num_sampled
        assert sampled < 8000
        await engine.generate(request(5, [1]))
        assert long.num_sampled == sampled
        return engine.gauges()["tokens"]

    # Without the withdrawal the two slots would be taken for 4,000 steps.
    assert running(path, use, slots=2, max_response_length=4000, max_prompt_length=8, stop=[]) < 4000


def test_a_waiting_request_can_be_cancelled_before_it_starts(path):
    async def use(engine):
        first = asyncio.create_task(engine.generate(request(4, range(2), max_tokens=1000)))
        waiting = request(5, range(4))
        task = asyncio.create_task(engine.generate(waiting))
        await asyncio.sleep(0)
        task.cancel()
        await first
        await engine.generate(request(6, [0]))
        return waiting.num_sampled

    assert running(path, use, slots=2, max_response_length=1000) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": [0] * 33}, "1 to 32 tokens, got 33"),
        ({"prompt_ids": []}, "1 to 32 tokens, got 0"),
        ({"prompt_ids": [1, VOCAB_SIZE]}, "0 to 60"),
        ({"prompt_ids": [-1, 5]}, "0 to 60"),
        ({"seeds": []}, "seed"),
    ],
)
def test_requests_that_can_not_fit_are_refused(path, changes, message):
    async def use(engine):
        asked = request(4, [0])
        for name, value in changes.items():
            setattr(asked, name, value)
        with pytest.raises(ValueError, match=message):
            await engine.generate(asked)
        with pytest.raises(ValueError, match="max_tokens is 1 to 48, got 49"):
            await engine.generate(request(4, [0], max_tokens=49))
        with pytest.raises(ValueError, match="top_p"):
            await engine.generate(request(4, [0], top_p=0.0))
        assert engine.num_outstanding == 0

    running(path, use)


def test_a_stopped_engine_ends_every_request_with_an_engine_error(path):
    async def main():
        engine = engine_for(path, slots=1)
        with pytest.raises(EngineError, match="not been started"):
            await engine.generate(request(4, [0]))
        await engine.start()
        tasks = [asyncio.create_task(engine.generate(request(4, range(2000), at))) for at in range(3)]
        await asyncio.sleep(0.01)
        await engine.stop()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineError)
            assert "stopped" in str(result)
        with pytest.raises(EngineError, match="stopped"):
            await engine.generate(request(4, [0]))
        await engine.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_in_the_engines_thread_reaches_every_request_with_its_cause(path):
    broken = random_model().state_dict()
    broken["model.norm.weight"] = broken["model.norm.weight"] * float("nan")

    async def use(engine):
        tasks = [asyncio.create_task(engine.generate(request(4, range(2000), at))) for at in range(2)]
        await asyncio.sleep(0.01)
        await engine.load_weights(1, broken)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineError)
            assert "version 1 give logits that are not finite" in str(result)
            assert isinstance(result.__cause__, EngineError)
        with pytest.raises(EngineError, match="not finite"):
            await engine.generate(request(4, [0]))
        with pytest.raises(EngineError, match="not finite"):
            await engine.load_weights(2, random_model().state_dict())

    running(path, use, slots=2)


def test_an_end_that_nobody_asked_for_is_noticed_at_once(path):
    broken = random_model().state_dict()
    broken["model.norm.weight"] = broken["model.norm.weight"] * float("nan")

    async def use(engine):
        ended = asyncio.create_task(engine.ended())
        generating = asyncio.create_task(engine.generate(request(4, range(200))))
        await asyncio.sleep(0)
        assert not ended.done()
        await engine.load_weights(1, broken)
        with pytest.raises(EngineError, match="not finite"):
            await ended
        with pytest.raises(EngineError, match="not finite"):
            await engine.ended()
        await asyncio.wait([generating])

    running(path, use)


def test_an_engine_that_was_stopped_has_ended_without_an_error(path):
    async def use(engine):
        ended = asyncio.create_task(engine.ended())
        await asyncio.sleep(0)
        assert not ended.done()
        await engine.stop()
        await ended
        with pytest.raises(EngineError, match="stopped"):
            await engine.ended()

    running(path, use)


def test_a_model_with_too_few_positions_is_refused_at_the_start(tmp_path):
    path = saved(random_model(max_position_embeddings=64), tmp_path)
    with pytest.raises(ConfigError, match="need 80 positions, the model has 64"):
        running(path, together)


def test_requests_that_wait_with_the_same_prompt_share_its_prefill(path):
    """As the first turns of a group's episodes do, each of which is a request of its own."""

    async def use(engine):
        before = request(9, range(2), max_tokens=200)
        _, *apart = await together(engine, before, *(request(20, [seed]) for seed in range(6)))
        return [sample for [sample] in apart], engine.gauges()["prefill_tokens"]

    apart, num_prefilled = running(path, use, slots=2, max_response_length=200)
    assert num_prefilled == 9 + 20
    [group] = running(path, lambda engine: together(engine, request(20, range(6))))
    assert same(apart, group)


def test_a_sample_that_is_continued_ends_as_it_would_have(path):
    """Its prompt is longer then than any prompt may be."""
    whole = request(30, [5, 6], max_tokens=LONG)

    def rest(seed, begun):
        left = msgspec.structs.replace(whole.sampling, max_tokens=LONG - len(begun.token_ids))
        prompt_ids, num_begun = [*whole.prompt_ids, *begun.token_ids.tolist()], len(begun.token_ids)
        return dataclasses.replace(whole, prompt_ids=prompt_ids, seeds=[seed], num_begun=num_begun, sampling=left)

    async def use(engine):
        task = asyncio.create_task(engine.generate(whole))
        while whole.num_sampled < 2 * 12:
            await asyncio.sleep(0.001)
        begun = await engine.so_far(whole)
        task.cancel()
        ends = await together(engine, *map(rest, whole.seeds, begun))
        return begun, [one.then(end) for one, [end] in zip(begun, ends, strict=True)], *await together(engine, whole)

    begun, continued, uninterrupted = running(path, use, max_response_length=LONG)
    assert all(12 <= len(one.token_ids) < LONG for one in begun)
    assert same(continued, uninterrupted)
