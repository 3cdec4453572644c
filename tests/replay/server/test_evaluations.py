"""The table of evaluation requests, without sockets and then behind the real ones."""

import asyncio

import pytest
from msgspec.structs import replace

from asyncdapo.errors import RunError
from asyncdapo.eval_messages import EvalAck, EvalRequest
from asyncdapo.messages import Lease
from asyncdapo.replay.server.evaluations import MAX_ISSUES, Evaluations
from asyncdapo.transport.payload import pack_answers
from tests.asynchronous import asynchronous
from tests.replay.serving import (
    TICK_S,
    FakeLearner,
    FakeWorker,
    eval_answers,
    eval_request,
    serving,
)


def make_table(share=1.0):
    return Evaluations(share)


def give(table, worker, tick=0):
    return table.next_for(worker, tick)


def answer(table, request, **fields):
    return table.answer(request.request_id, eval_answers(request, **fields))


def test_answers_come_in_the_order_of_requests_whoever_was_first():
    table, requests = make_table(), [eval_request(1), eval_request(2)]
    evaluation = table.start(requests)
    first, second = give(table, 0), give(table, 1)
    assert answer(table, second) is evaluation
    assert not evaluation.done
    answer(table, first)
    assert evaluation.done
    assert [one.prompt_id for one in evaluation.all_answers()] == [1000, 1001, 2000, 2001]


def test_an_evaluation_without_requests_is_done_at_once():
    assert make_table().start([]).done


def test_requests_of_a_lost_worker_go_to_the_next_one_first():
    table = make_table()
    table.start([eval_request(1), eval_request(2)])
    give(table, 0)
    table.lose_worker(0)
    assert (table.num_waiting, table.num_under_way) == (2, 0)
    assert give(table, 1).request_id == 1


def test_a_request_that_is_silent_for_long_is_given_out_again():
    table = make_table()
    table.start([eval_request(1)])
    give(table, 0, tick=3)
    table.lose_silent(since=3)
    assert give(table, 0, tick=4) is None
    table.lose_silent(since=4)
    assert give(table, 0, tick=4).request_id == 1


def test_a_request_that_its_workers_heartbeats_dont_know_is_sent_again():
    table = make_table()
    table.start([eval_request(1), eval_request(2), eval_request(3)])
    assert [give(table, 0).request_id for _ in range(2)] == [1, 2]
    give(table, 1)
    assert table.note_listed(0, [2]) == []
    assert [lost.request_id for lost in table.note_listed(0, [2])] == [1]
    assert table.note_listed(0, [2]) == []
    assert table.note_listed(0, [1, 2]) == []
    assert table.note_listed(0, [2]) == []


def test_the_first_answer_counts_and_later_ones_are_dropped():
    table = make_table()
    evaluation = table.start([eval_request(1), eval_request(2)])
    given = give(table, 0)
    table.lose_worker(0)
    answer(table, given, acc=1.0)
    assert give(table, 1).request_id == 2
    assert answer(table, given, acc=0.0) is None
    assert {one.acc for one in evaluation.answers[1]} == {1.0}


def test_an_answer_after_the_evaluation_is_dropped():
    table = make_table()
    evaluation = table.start([eval_request(1)])
    given = give(table, 0)
    table.leave(evaluation)
    assert answer(table, given) is None
    assert (table.num_waiting, table.num_under_way) == (0, 0)


@pytest.mark.parametrize(
    "broken",
    [
        {"prompt_id": 99},
        {"sample": 1},
        {"acc": float("nan")},
        {"acc": float("inf")},
        {"num_tokens": -1},
    ],
)
def test_answers_that_are_not_the_requests_are_refused_and_it_stays_open(broken):
    table = make_table()
    evaluation = table.start([eval_request(1, num_prompts=1)])
    given = give(table, 0)
    [right] = eval_answers(given)
    with pytest.raises(ValueError, match="request 1"):
        table.answer(1, [replace(right, **broken)])
    assert not evaluation.done
    assert answer(table, given) is evaluation


def test_a_request_that_nobody_ever_answers_ends_the_run():
    table = make_table()
    table.start([eval_request(1)])
    for _ in range(MAX_ISSUES - 1):
        give(table, 0)
        table.lose_worker(0)
    give(table, 0)
    with pytest.raises(RunError, match="given out 5 times"):
        table.lose_worker(0)


def test_two_evaluations_at_once_keep_their_answers_apart():
    table = make_table()
    first, second = table.start([eval_request(1)]), table.start([eval_request(2)])
    given = [give(table, 0), give(table, 0)]
    assert answer(table, given[1]) is second
    assert not first.done


def test_who_asks_for_a_running_evaluation_joins_it():
    table = make_table()
    evaluation = table.start([eval_request(1), eval_request(2)])
    assert table.start([eval_request(1), eval_request(2)]) is evaluation
    assert table.num_waiting == 2
    table.leave(evaluation)
    given = give(table, 0)
    assert answer(table, given) is evaluation
    table.leave(evaluation)
    assert (table.num_waiting, table.num_under_way) == (0, 0)


def test_after_a_rollback_everything_is_asked_anew():
    table = make_table()
    evaluation = table.start([eval_request(1), eval_request(2)])
    answer(table, give(table, 0))
    give(table, 0)
    table.start_again()
    assert (table.num_waiting, table.num_under_way, evaluation.answers) == (2, 0, {})
    assert [give(table, 0).request_id for _ in range(2)] == [1, 2]


def test_a_request_id_in_use_is_refused():
    table = make_table()
    table.start([eval_request(1)])
    with pytest.raises(ValueError, match="in use"):
        table.start([eval_request(1), eval_request(3)])
    with pytest.raises(ValueError, match="used once"):
        table.start([eval_request(2), eval_request(2)])


# --------------------------------------------------------------------------------------------- behind real sockets


@asynchronous
async def test_evaluation_goes_ahead_of_leases_and_uses_up_credits(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        evaluating = asyncio.create_task(server.evaluate([eval_request(1), eval_request(2)]))
        await server.begin()
        await worker.ask(2)
        request = await worker.take(EvalRequest)
        await worker.take(Lease)
        assert await worker.unread() == []
        await worker.evaluate(request)
        assert await worker.take(EvalAck) == EvalAck(request_id=request.request_id)
        await worker.ask(1)
        await worker.evaluate(await worker.take(EvalRequest), acc=0.0)
        answers = await evaluating
        assert [answer.acc for answer in answers] == [1.0, 1.0, 0.0, 0.0]
        assert [answer.prompt_id for answer in answers] == [1000, 1001, 2000, 2001]


@asynchronous
async def test_responses_come_with_the_answers(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await worker.ask(1)
        evaluating = asyncio.create_task(server.evaluate([eval_request(1, samples=(0, 5))]))
        response = "x²\n" * 500_000
        await worker.evaluate(await worker.take(EvalRequest), response=response)
        answers = await evaluating
        assert [(answer.prompt_id, answer.sample) for answer in answers] == [(1000, 0), (1000, 5), (1001, 0), (1001, 5)]
        assert {answer.response for answer in answers} == {response}


@asynchronous
async def test_answers_whose_responses_are_damaged_are_refused_and_asked_for_again(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await worker.ask(1)
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)]))
        request = await worker.take(EvalRequest)
        done, [frame] = pack_answers(1, eval_answers(request, response="six"))
        for frames in ([frame[:-1]], [], [b"\xff" * len(frame)]):
            await worker.client.send(done, frames)
            await worker.take(EvalAck)
        for _ in range(2):
            await worker.beat()
        await worker.evaluate(await worker.take(EvalRequest))
        assert len(await evaluating) == 2
        assert server.status()["dropped"]["rejected"] == 3


@asynchronous
async def test_evaluation_requests_of_a_lost_worker_are_given_to_another(tmp_path):
    async with serving(tmp_path) as server:
        doomed, other = FakeWorker(server, 0, "first"), FakeWorker(server, 1)
        await doomed.join()
        await doomed.ask(1)
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)]))
        await doomed.take(EvalRequest)
        assert server.status()["why_waiting"] == "rollout: no batch is wanted; 1 evaluation requests are open"
        await other.join()
        await other.ask(1)
        await FakeWorker(server, 0, "second").join()
        await other.evaluate(await other.take(EvalRequest))
        assert len(await evaluating) == 2


@asynchronous
async def test_an_evaluation_request_that_a_live_worker_never_answers_is_given_out_again(tmp_path):
    async with serving(tmp_path, heartbeat_s=TICK_S, lease_stall_s=2 * TICK_S) as server:
        worker = FakeWorker(server)
        await worker.join()
        await worker.ask(2)
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)]))
        await worker.take(EvalRequest)
        await worker.evaluate(await worker.take(EvalRequest))
        assert len(await evaluating) == 2


@asynchronous
async def test_an_evaluation_request_that_was_lost_is_sent_again_and_takes_no_second_credit(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await worker.ask(1)
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)]))
        lost = await worker.take(EvalRequest)
        await worker.beat()
        await worker.beat()
        assert await worker.take(EvalRequest) == lost
        for _ in range(3):
            await worker.beat(evaluations=[1])
        assert await worker.unread() == []
        await worker.evaluate(lost)
        assert len(await evaluating) == 2


@asynchronous
async def test_a_repeated_evaluation_answer_is_acknowledged_and_counts_once(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        evaluating = asyncio.create_task(server.evaluate([eval_request(1), eval_request(2)]))
        await worker.ask(2)
        first, second = await worker.take(EvalRequest), await worker.take(EvalRequest)
        for _ in range(2):
            await worker.evaluate(first)
            assert await worker.take(EvalAck) == EvalAck(request_id=1)
        assert not evaluating.done()
        await worker.evaluate(second)
        assert len(await evaluating) == 4
        await server.begin()
        await worker.work_off(2)
        await learner.want(1)
        await learner.receive()
        assert (await server.trained(1, {}))["replay/tokens_evaluation"] == 12


@asynchronous
async def test_an_evaluation_that_is_given_up_leaves_nothing_behind(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)]))
        await asyncio.sleep(0)
        evaluating.cancel()
        await asyncio.gather(evaluating, return_exceptions=True)
        await worker.ask(1)
        assert await worker.unread() == []
        assert server.status()["evaluations_waiting"] == 0


@asynchronous
async def test_the_end_of_training_gives_up_what_runs_and_leaves_room_for_the_final_evaluation(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        evaluating = asyncio.create_task(server.evaluate([eval_request(number) for number in range(1, 5)]))
        await worker.ask(1)
        late = await worker.take(EvalRequest)
        await server.finish()
        with pytest.raises(RunError, match="given up"):
            await evaluating
        final = asyncio.create_task(server.evaluate([eval_request(5)]))
        await worker.evaluate(late)
        await worker.ask(1)
        await worker.evaluate(await worker.take(EvalRequest))
        assert [answer.prompt_id for answer in await final] == [5000, 5001]
