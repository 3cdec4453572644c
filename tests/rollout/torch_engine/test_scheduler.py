"""Who starts when slots come free."""

import asyncio

from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.engine import Priority, Request
from asyncdapo.rollout.torch_engine.scheduler import Job, Scheduler

from .models import engine_for, random_model, request, saved


def job(num_samples=4, priority=Priority.FRESH):
    return Job(Request(prompt_ids=[1], seeds=list(range(num_samples)), sampling=Sampling(), priority=priority))


def start(scheduler, num_running):
    starts = scheduler.take(num_running)
    for started, count in starts:
        started.num_started += count
    return starts


def test_requests_start_in_order_of_arrival_and_fill_all_slots():
    scheduler, jobs = Scheduler(10), [job(), job(), job()]
    for each in jobs:
        scheduler.add(each)
    assert start(scheduler, 0) == [(jobs[0], 4), (jobs[1], 4), (jobs[2], 2)]
    assert start(scheduler, 8) == [(jobs[2], 2)]
    assert not scheduler


def test_nothing_starts_before_a_sixteenth_of_the_slots_is_free():
    scheduler = Scheduler(64)
    scheduler.add(job(16))
    assert start(scheduler, 61) == []
    assert [count for _, count in start(scheduler, 60)] == [4]


def test_few_slots_are_filled_one_by_one():
    scheduler = Scheduler(4)
    scheduler.add(job(2))
    assert [count for _, count in start(scheduler, 3)] == [1]


def test_requests_go_by_priority_even_before_half_started_ones():
    scheduler, early, urgent = Scheduler(4), job(6), job(2, priority=Priority.PROBE)
    scheduler.add(early)
    assert start(scheduler, 0) == [(early, 4)]
    scheduler.add(urgent)
    assert start(scheduler, 0) == [(urgent, 2), (early, 2)]


def test_a_withdrawn_request_never_starts():
    scheduler, gone, stays = Scheduler(4), job(), job()
    scheduler.add(gone)
    scheduler.add(stays)
    scheduler.withdraw(gone)
    scheduler.withdraw(gone)
    assert start(scheduler, 0) == [(stays, 4)]


def test_one_at_a_time_never_mixes_requests_and_waits_for_empty_slots():
    scheduler, first, second = Scheduler(4, one_at_a_time=True), job(6), job(2)
    scheduler.add(first)
    scheduler.add(second)
    assert start(scheduler, 0) == [(first, 4)]
    assert start(scheduler, 1) == []
    assert start(scheduler, 0) == [(first, 2)]
    assert start(scheduler, 0) == [(second, 2)]


def test_the_event_loop_hears_of_ends_when_slots_can_be_filled_and_not_of_each(tmp_path):
    bursts = [0]

    async def generate():
        loop = asyncio.get_running_loop()

        def note_end():
            if not bursts[-1]:
                loop.call_soon(bursts.append, 0)
            bursts[-1] += 1

        asked = request(6, range(64), max_tokens=48)
        asked.on_sample_done = note_end
        engine = engine_for(saved(random_model(), tmp_path), slots=64, stop=[3, 8, 13])
        await engine.start()
        await engine.generate(asked)
        await engine.stop()

    asyncio.run(generate())
    with_starts, *told, last, _ = bursts  # who ends in its first step is told of with the start
    assert with_starts + sum(told) + last == 64
    assert len(told) > 1
    assert min(told) >= 4
