"""Places of running sequences: the first idle ones, and every one's own data with it."""

import random

import numpy as np

from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.engine import Request
from asyncdapo.rollout.torch_engine.batch import Batch
from asyncdapo.rollout.torch_engine.scheduler import Job


def job(num_samples, prompt_length=1, max_tokens=200):
    sampling = Sampling(max_tokens=max_tokens)
    return Job(Request(prompt_ids=[0] * prompt_length, seeds=list(range(num_samples)), sampling=sampling))


def step(batch, value=0):
    """Every slot in use samples its own number."""
    slots = np.arange(batch.num_used)
    batch.append(slots, slots + value, -(slots + value).astype(np.float32))


def test_every_sequence_keeps_its_own_tokens_through_random_ends_and_moves():
    draw, batch = random.Random(0), Batch(num_slots=24, max_tokens=200, block_size=8)
    expected: dict = {}
    for turn in range(200):
        if draw.random() < 0.3:
            assert all(target < source for source, target in batch.close_gaps())
            assert batch.num_used == batch.num_active
            assert all(batch.running[slot] is not None for slot in range(batch.num_used))
        fresh = draw.randint(0, 24 - batch.num_active)
        if fresh:
            batch.seat(job(fresh, draw.randint(1, 20)), fresh)
        step(batch, turn)
        for slot, running in batch.sequences():
            expected.setdefault(running, []).append(slot + turn)
        for slot, running in list(batch.sequences()):
            if draw.random() < 0.2:
                sample = batch.sample(slot, 0, "stop")
                batch.release(slot)
                assert sample.token_ids.tolist() == expected.pop(running)
                assert sample.logprobs.tolist() == [-token for token in sample.token_ids.tolist()]
                assert sample.versions == [(0, len(sample.token_ids))]


def test_moves_carry_the_cache_along():
    draw, batch = random.Random(1), Batch(num_slots=24, max_tokens=200, block_size=8)
    cache: list = [None] * 24
    for _ in range(100):
        for source, target in batch.close_gaps():
            cache[target] = cache[source]
        for slot, running in batch.sequences():
            assert cache[slot] is running
        if fresh := 24 - batch.num_active:
            for slot in batch.seat(job(fresh), fresh):
                cache[slot] = batch.running[slot]
        for slot, _ in list(batch.sequences()):
            if draw.random() < 0.1:
                batch.release(slot)


def test_a_sequence_starts_in_the_first_idle_slots_and_moves_only_to_close_gaps():
    batch = Batch(num_slots=16, max_tokens=200, block_size=4)
    assert batch.seat(job(8), 8).tolist() == list(range(8))
    for slot in (1, 2, 6):
        batch.release(slot)
    assert batch.seat(job(5), 5).tolist() == [1, 2, 6, 8, 9]
    for slot in (0, 5, 9):
        batch.release(slot)
    assert batch.close_gaps() == [(7, 0), (8, 5)]
    assert batch.close_gaps() == []


def test_a_span_reads_no_further_than_its_own_longest_sequence():
    batch = Batch(num_slots=16, max_tokens=200, block_size=4)
    batch.seat(job(8), 8)
    for _ in range(40):
        step(batch)
    batch.seat(job(8), 8)
    assert batch.spans() == [(0, 8, 64), (8, 16, 32)]


def test_released_slots_do_not_lengthen_a_span():
    batch = Batch(num_slots=8, max_tokens=200, block_size=4)
    batch.seat(job(1, prompt_length=100), 1)
    batch.seat(job(3), 3)
    step(batch)
    assert batch.spans() == [(0, 4, 128)]
    batch.release(0)
    assert batch.spans() == [(0, 4, 32)]


def test_versions_are_run_lengths_without_empty_runs():
    batch = Batch(num_slots=2, max_tokens=200, block_size=2)
    batch.seat(job(1), 1)
    running = batch.running[0]
    step(batch)
    step(batch)
    running.close_run(3, 2)
    running.close_run(4, 2)
    step(batch)
    assert batch.sample(0, 5, "length").versions == [(3, 2), (5, 1)]


def test_each_sample_has_the_uniforms_of_its_own_seed():
    batch = Batch(num_slots=4, max_tokens=8, block_size=4)
    slots = batch.seat(job(4, max_tokens=8), 3)
    first = batch.next_uniforms(slots)
    step(batch)
    assert len(set(first)) == 3
    assert not set(first) & set(batch.next_uniforms(slots))
    again = Batch(num_slots=4, max_tokens=8, block_size=4)
    again.seat(job(4, max_tokens=8), 3)
    assert (again.next_uniforms(slots) == first).all()
