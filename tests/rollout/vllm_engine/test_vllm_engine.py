"""The vLLM engine as a rollout worker sees it: samples, versions, withdrawal, refusals, failures. One engine for all
tests; the last ones break it, in this order: a load that fails, and the death of its process."""

from __future__ import annotations

import asyncio
import os
import signal

import msgspec
import numpy as np
import pytest

pytest.importorskip("vllm")

from asyncdapo.errors import ConfigError, EngineError, RunError, UserError, WeightsError
from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.engine import Priority, Request, Sample, Sampled
from asyncdapo.rollout.vllm_engine.arguments import STREAM_INTERVAL
from asyncdapo.transport.payload import expand

from ...asynchronous import until
from ...reward.processes import is_alive
from ..torch_engine.models import VOCAB_SIZE, largest_difference, request
from .models import (
    MAX_PROMPT_LENGTH,
    MAX_RESPONSE_LENGTH,
    STOP_TOKEN_IDS,
    model_of,
    save_versions,
    vllm_engine,
)

pytestmark = pytest.mark.vllm

PARITY = 1e-3
SLOTS = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_versions(tmp_path_factory.mktemp("versions"))


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield lambda work: runner.run(asyncio.wait_for(work, 60))


@pytest.fixture(scope="module")
def engine(path, loop):
    engine = vllm_engine(path, stop=STOP_TOKEN_IDS, slots=SLOTS)
    loop(engine.start())
    pids = engine.pids()
    yield engine
    loop(engine.stop())
    assert not any(map(is_alive, pids))


def endless(num_samples: int = 5 * SLOTS, prompt_seed: int = 0) -> Request:
    """More samples than slots, so that some wait until the rest is nearly done."""
    return request(9, range(num_samples), prompt_seed, max_tokens=MAX_RESPONSE_LENGTH)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_checkpoint_at_the_sampling_temperature(engine, loop, temperature):
    asked = request(12, range(8), temperature=temperature, max_tokens=60)
    samples = loop(engine.generate(asked))
    assert max(largest_difference(model_of(0), asked, sample) for sample in samples) < PARITY
    assert len({tuple(sample.token_ids) for sample in samples}) > 1


def test_a_stop_token_ends_a_response_and_is_its_last_token(engine, loop):
    asked = request(6, range(40), max_tokens=30)
    samples = loop(engine.generate(asked))
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        stops = np.isin(sample.token_ids, STOP_TOKEN_IDS)
        assert not stops[:-1].any()
        assert stops[-1] == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.token_ids) == 30
        assert (sample.token_ids.dtype, sample.logprobs.dtype) == (np.int32, np.float32)
        assert len(sample.logprobs) == len(sample.token_ids) == sum(count for _, count in sample.versions)


def test_an_evaluation_is_repeated_by_its_seeds_and_training_is_not(engine, loop):
    def asked(seeded: bool) -> Request:
        wanted = request(9, [5, 6])
        wanted.seeded = seeded
        return wanted

    async def twice(seeded: bool) -> list[list[tuple[int, ...]]]:
        runs = [await engine.generate(asked(seeded)), await engine.generate(asked(seeded))]
        return [[tuple(sample.token_ids) for sample in run] for run in runs]

    one, other = loop(twice(seeded=True))
    assert one == other
    assert one[0] != one[1]
    one, other = loop(twice(seeded=False))
    assert one != other


def test_each_request_has_its_own_sampling_parameters(engine, loop):
    async def use():
        requests = request(9, [1]), request(9, [1], temperature=0.0), request(9, [1], top_k=1)
        return await asyncio.gather(*(engine.generate(asked) for asked in requests))

    [plain], [greedy], [narrow] = loop(use())
    assert np.array_equal(narrow.token_ids, greedy.token_ids)
    assert not np.array_equal(plain.token_ids, greedy.token_ids)


def test_progress_and_counters_add_up(engine, loop):
    async def use():
        before, started, running, room = engine.gauges(), [], [], []
        requests = [request(length, range(3), length, max_tokens=50) for length in (4, 7, 12)]
        for asked in requests:
            asked.on_started = lambda version, asked=asked: (started.append(version), running.append(asked.num_running))
            asked.on_sample_done = lambda: room.append(engine.num_outstanding)
        waiting = asyncio.gather(*(engine.generate(asked) for asked in requests))
        await asyncio.sleep(0)
        assert engine.num_outstanding == 9
        samples = await waiting
        after = engine.gauges()
        assert running == [1, 1, 1]
        return requests, samples, started, room, {key: after[key] - before[key] for key in before}

    requests, samples, started, room, spent = loop(use())
    lengths = [sum(len(sample.token_ids) for sample in group) for group in samples]
    assert [asked.num_sampled for asked in requests] == lengths
    assert [asked.num_running for asked in requests] == [0, 0, 0]
    assert started == [engine.loaded_version] * 3
    assert room == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert spent["tokens"] == sum(lengths)
    assert 0 < spent["prefill_tokens"] <= 3 * (4 + 7 + 12)
    assert engine.num_outstanding == 0


def test_the_scheduler_says_how_full_its_cache_is(engine, loop):
    async def use():
        shares: list[float] = []
        waiting = asyncio.ensure_future(engine.generate(request(40, range(3), max_tokens=50)))
        while not waiting.done():
            shares.append(engine.gauges()["kv_use"])
            await asyncio.sleep(0.01)
        return shares

    shares = loop(use())
    assert 0 < max(shares) < 1, shares
    assert engine.gauges()["preemptions"] == 0


def test_urgent_requests_start_before_those_that_wait(engine, loop):
    async def use():
        order: list[str] = []
        full = asyncio.gather(*(engine.generate(endless(SLOTS // 2, seed)) for seed in (1, 2)))
        waiting, urgent = request(4, [0], max_tokens=2), request(5, [0], max_tokens=2)
        urgent.priority = Priority.PROBE
        waiting.on_started = lambda _: order.append("waiting")
        urgent.on_started = lambda _: order.append("urgent")
        await asyncio.gather(engine.generate(waiting), engine.generate(urgent), full)
        return order

    assert loop(use()) == ["urgent", "waiting"]


def test_a_withdrawn_request_frees_its_slots_at_once(engine, loop):
    async def use():
        asked = endless()
        task = asyncio.create_task(engine.generate(asked))
        await until(lambda: asked.num_running == SLOTS)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert engine.num_outstanding == 0
        num_sampled = asked.num_sampled
        other = request(5, range(SLOTS), max_tokens=2)
        await engine.generate(other)  # in slots that would have been busy for hundreds of tokens
        return num_sampled, asked.num_sampled

    before, after = loop(use())
    assert before == after < SLOTS * MAX_RESPONSE_LENGTH


@pytest.mark.parametrize(
    ("prompt_ids", "max_tokens", "problem"),
    [
        ([], 5, "a prompt has 1 to"),
        ([1] * (MAX_PROMPT_LENGTH + 1), 5, "a prompt has 1 to"),
        ([1, VOCAB_SIZE], 5, "token ids are 0 to"),
        ([1], MAX_RESPONSE_LENGTH + 1, "max_tokens"),
    ],
)
def test_a_request_that_vllm_would_die_of_is_refused(engine, loop, prompt_ids, max_tokens, problem):
    bad = Request(prompt_ids=prompt_ids, seeds=[1], sampling=Sampling(max_tokens=max_tokens))
    with pytest.raises(ValueError, match=problem):
        loop(engine.generate(bad))
    assert loop(engine.generate(request(4, [1])))


def test_a_failing_call_of_the_workers_says_so_and_harms_nothing(engine, loop):
    with pytest.raises(RunError, match="no such luck"):
        loop(engine.rpc("fail", "no such luck"))
    assert loop(engine.rpc("process_id")) == engine.pids()
    assert loop(engine.rpc("num_threads")) == [1]


def test_the_longest_request_fits(engine, loop):
    asked = request(MAX_PROMPT_LENGTH, range(2), max_tokens=MAX_RESPONSE_LENGTH)
    assert max(largest_difference(model_of(0), asked, sample) for sample in loop(engine.generate(asked))) < PARITY


def test_every_token_bears_the_version_that_sampled_it_and_no_prompt_is_read_by_two(engine, loop):
    """`on_update: keep`. What began after the update is exact: it has read no key or value of the old weights."""

    async def use():
        asked = request(140, range(5 * SLOTS), max_tokens=200)
        task = asyncio.create_task(engine.generate(asked))
        await until(lambda: asked.num_sampled > 100)
        times = await engine.load_weights(1, None)
        assert engine.loaded_version == 1
        at_load = asked.num_sampled
        await until(lambda: asked.num_sampled > at_load + 20 * SLOTS)  # vLLM has handed out what it held at the load
        return asked, await engine.so_far(asked), await task, times

    asked, begun, samples, times = loop(use())
    assert {len(one.versions) for one in begun} >= {0, 2}
    for one, sample in zip(begun, samples, strict=True):
        assert expand([*one.versions, (-1, 0)]).tolist() == expand(sample.versions).tolist()[: len(one.token_ids)]
    assert min(times.pause_s, times.load_s, times.resume_s) > 0
    assert {tuple(version for version, _ in sample.versions) for sample in samples} >= {(0, 1), (1,)}
    for sample in samples:
        assert sum(count for _, count in sample.versions) == len(sample.token_ids)
        if sample.versions[0][0] == 1:
            assert largest_difference(model_of(1), asked, sample) < PARITY


def test_what_another_engine_has_begun_is_continued_exactly(engine, loop):
    async def rest_of(one: Sampled, asked: Request) -> Sample:
        ids = one.token_ids.tolist()
        left = msgspec.structs.replace(asked.sampling, max_tokens=MAX_RESPONSE_LENGTH - len(ids))
        prompt_ids = [*asked.prompt_ids, *ids]
        [rest] = await engine.generate(
            Request(prompt_ids=prompt_ids, seeds=[0], sampling=left, num_begun=len(ids), priority=Priority.CONTINUATION)
        )
        return one.then(rest)

    async def use():
        asked = endless()
        task = asyncio.create_task(engine.generate(asked))
        await until(lambda: asked.num_sampled > 20 * SLOTS)
        asked.handed_back = True
        begun = [one for one in await engine.so_far(asked) if len(one.token_ids) and not isinstance(one, Sample)]
        task.cancel()
        return asked, begun, [await rest_of(one, asked) for one in begun]

    asked, begun, samples = loop(use())
    assert any(len(one.token_ids) % STREAM_INTERVAL != 1 for one in begun), "vLLM holds nothing back"
    assert all(len(one.token_ids) < len(sample.token_ids) for one, sample in zip(begun, samples, strict=True))
    assert max(largest_difference(model_of(1), asked, sample) for sample in samples) < PARITY


def test_nothing_is_sampled_while_paused_and_requests_resume_afterwards(engine, loop):
    async def use():
        asked = endless()
        task = asyncio.create_task(engine.generate(asked))
        await until(lambda: asked.num_sampled > 10)
        async with engine.paused():
            paused_at = asked.num_sampled
            async with engine.paused():
                late = asyncio.create_task(engine.generate(request(4, [1])))
            await engine.rpc("process_id")  # vLLM would have sampled by the time it answers
            assert asked.num_sampled == paused_at
            assert not late.done()
        await asyncio.gather(task, late)
        return paused_at, asked.num_sampled

    before, after = loop(use())
    assert after > before


def test_after_a_load_that_failed_half_way_the_next_one_resumes_with_the_requests(engine, loop):
    async def use():
        asked = endless()
        task = asyncio.create_task(engine.generate(asked))
        await until(lambda: asked.num_sampled > 50)
        with pytest.raises(WeightsError, match="version 77 can't be loaded"):
            await engine.load_weights(77, None)
        stopped_at, version = asked.num_sampled, engine.loaded_version
        fresh = request(11, [3], max_tokens=20)
        late = asyncio.create_task(engine.generate(fresh))
        await engine.rpc("process_id")
        assert asked.num_sampled == stopped_at
        await engine.load_weights(2, None)
        return version, await task, fresh, await late

    version, samples, fresh, [late] = loop(use())
    assert version == 1
    assert engine.loaded_version == 2
    assert {tuple(version for version, _ in sample.versions) for sample in samples} >= {(1, 2), (2,)}
    assert largest_difference(model_of(2), fresh, late) < PARITY


def test_the_death_of_its_process_ends_the_engine_at_once_for_all_who_wait(engine, loop):
    async def use():
        ended = asyncio.create_task(engine.ended())
        waiting = [asyncio.create_task(engine.generate(endless(prompt_seed=seed))) for seed in (1, 2)]
        call = asyncio.create_task(engine.rpc("process_id"))
        await asyncio.sleep(0)
        os.kill(engine.pids()[0], signal.SIGKILL)
        await asyncio.wait([ended, *waiting])
        await asyncio.wait([call])
        with pytest.raises(EngineError, match="ended"):
            await engine.generate(request(4, [1]))
        with pytest.raises(EngineError, match="ended"):
            await engine.load_weights(3, None)
        return [task.exception() for task in (ended, *waiting)]

    errors = loop(use())
    assert [type(error) for error in errors] == [EngineError] * 3


def test_an_unknown_argument_is_refused_before_anything_starts_and_the_nearest_one_named(path, loop):
    refused = vllm_engine(path, engine_args={"quantisation": "fp8"})
    with pytest.raises(ConfigError, match="no such argument, got 'quantisation' .did you mean quantization"):
        loop(refused.start())
    loop(refused.stop())


def test_a_value_that_vllm_refuses_is_named_in_a_line(path, loop):
    refused = vllm_engine(path, engine_args={"block_size": "banana"})
    with pytest.raises(UserError, match="rollout.engine_args: block_size: .*valid integer") as caught:
        loop(refused.start())
    assert "\n" not in str(caught.value)
    loop(refused.stop())


def test_what_vllm_refuses_is_the_users_to_fix(path, loop):
    refused = vllm_engine(path, max_response_length=9000)
    with pytest.raises(UserError, match="max_model_len"):
        loop(refused.start())
    loop(refused.stop())
