"""The table of evaluation requests, without sockets and then behind the real ones."""

import asyncio

import pytest

from asyncdapo.errors import RunError
from asyncdapo.messages import EvalAck, EvalAnswer, EvalDone, EvalRequest, Lease, Sampling
from asyncdapo.replay.evaluations import MAX_ISSUES, Evaluations
from tests.replay.serving import TICK_S, FakeLearner, FakeWorker, eval_request, scenario, serving
from tests.replay.small_run import prompt_at


def request(request_id, num_prompts=2):
    prompts = [prompt_at(10 * request_id + i) for i in range(num_prompts)]
    return EvalRequest(request_id=request_id, seed=1, sampling=Sampling(), prompts=prompts)


def answers(request, acc=1.0):
    return EvalDone(
        request_id=request.request_id,
        answers=[
            EvalAnswer(
                prompt_id=prompt.prompt_id, acc=acc, num_tokens=3, finish_reason="stop", version_min=0, version_max=0
            )
            for prompt in request.prompts
        ],
    )


def test_answers_come_in_the_order_of_requests_whoever_was_first():
    table, requests = Evaluations(total_slots=8), [request(1), request(2)]
    evaluation = table.start(requests, share=1.0)
    first, second = table.next_for(0, tick=0), table.next_for(1, tick=0)
    assert table.answer(answers(second)) is evaluation
    assert not evaluation.done
    table.answer(answers(first))
    assert evaluation.done
    assert [answer.prompt_id for answer in evaluation.all_answers()] == [10, 11, 20, 21]


def test_an_evaluation_without_requests_is_done_at_once():
    assert Evaluations(total_slots=8).start([], share=1.0).done


def test_requests_under_way_hold_at_most_their_share_of_the_slots():
    table = Evaluations(total_slots=8)
    table.start([request(i) for i in range(4)], share=0.5)
    first = table.next_for(0, tick=0)
    assert table.next_for(0, tick=0) is not None
    assert table.next_for(0, tick=0) is None
    table.answer(answers(first))
    assert table.next_for(1, tick=0) is not None


def test_one_request_may_go_however_small_the_share_is():
    table = Evaluations(total_slots=8)
    table.start([request(1, num_prompts=6), request(2)], share=0.1)
    assert table.next_for(0, tick=0).request_id == 1
    assert table.next_for(0, tick=0) is None


def test_requests_of_a_lost_worker_go_to_the_next_one_first():
    table = Evaluations(total_slots=8)
    table.start([request(1), request(2)], share=1.0)
    table.next_for(0, tick=0)
    table.lose_worker(0)
    assert (table.num_waiting, table.num_under_way) == (2, 0)
    assert table.next_for(1, tick=0).request_id == 1


def test_a_request_that_is_silent_for_long_is_given_out_again():
    table = Evaluations(total_slots=8)
    table.start([request(1)], share=1.0)
    table.next_for(0, tick=3)
    table.lose_silent(since=3)
    assert table.next_for(0, tick=4) is None
    table.lose_silent(since=4)
    assert table.next_for(0, tick=4).request_id == 1


def test_a_request_that_its_workers_heartbeats_dont_know_is_sent_again():
    table = Evaluations(total_slots=8)
    table.start([request(1), request(2), request(3)], share=1.0)
    assert [table.next_for(0, tick=0).request_id for _ in range(2)] == [1, 2]
    table.next_for(1, tick=0)
    assert table.note_listed(0, [2]) == []
    assert [lost.request_id for lost in table.note_listed(0, [2])] == [1]
    assert table.note_listed(0, [2]) == []
    assert table.note_listed(0, [1, 2]) == []
    assert table.note_listed(0, [2]) == []


def test_the_first_answer_counts_and_later_ones_are_dropped():
    table = Evaluations(total_slots=8)
    evaluation = table.start([request(1), request(2)], share=1.0)
    given = table.next_for(0, tick=0)
    table.lose_worker(0)
    table.answer(answers(given, acc=1.0))
    assert table.next_for(1, tick=0).request_id == 2
    assert table.answer(answers(given, acc=0.0)) is None
    assert {answer.acc for answer in evaluation.answers[1]} == {1.0}


def test_an_answer_after_the_evaluation_is_dropped():
    table = Evaluations(total_slots=8)
    evaluation = table.start([request(1)], share=1.0)
    given = table.next_for(0, tick=0)
    table.leave(evaluation)
    assert table.answer(answers(given)) is None
    assert (table.num_waiting, table.num_under_way) == (0, 0)


@pytest.mark.parametrize(
    "broken",
    [
        {"prompt_id": 99},
        {"acc": float("nan")},
        {"num_tokens": -1},
    ],
)
def test_answers_that_are_not_the_requests_are_refused_and_it_stays_open(broken):
    table = Evaluations(total_slots=8)
    evaluation = table.start([request(1, num_prompts=1)], share=1.0)
    given = table.next_for(0, tick=0)
    fields = {"prompt_id": 10, "acc": 1.0, "num_tokens": 3, "finish_reason": "stop", "version_min": 0, "version_max": 0}
    with pytest.raises(ValueError, match="request 1"):
        table.answer(EvalDone(request_id=1, answers=[EvalAnswer(**fields | broken)]))
    assert not evaluation.done
    assert table.answer(answers(given)) is evaluation


def test_a_request_that_nobody_ever_answers_ends_the_run():
    table = Evaluations(total_slots=8)
    table.start([request(1)], share=1.0)
    for _ in range(MAX_ISSUES - 1):
        table.next_for(0, tick=0)
        table.lose_worker(0)
    table.next_for(0, tick=0)
    with pytest.raises(RunError, match="given out 5 times"):
        table.lose_worker(0)


def test_two_evaluations_at_once_keep_their_answers_apart():
    table = Evaluations(total_slots=8)
    first, second = table.start([request(1)], share=1.0), table.start([request(2)], share=1.0)
    given = [table.next_for(0, tick=0), table.next_for(0, tick=0)]
    assert table.answer(answers(given[1])) is second
    assert not first.done


def test_who_asks_for_an_evaluation_that_goes_on_joins_it():
    table = Evaluations(total_slots=8)
    evaluation = table.start([request(1), request(2)], share=1.0)
    assert table.start([request(1), request(2)], share=1.0) is evaluation
    assert table.num_waiting == 2
    table.leave(evaluation)
    given = table.next_for(0, tick=0)
    assert table.answer(answers(given)) is evaluation
    table.leave(evaluation)
    assert (table.num_waiting, table.num_under_way) == (0, 0)


def test_after_a_rollback_everything_is_asked_anew():
    table = Evaluations(total_slots=8)
    evaluation = table.start([request(1), request(2)], share=1.0)
    table.answer(answers(table.next_for(0, tick=0)))
    table.next_for(0, tick=0)
    table.start_again()
    assert (table.num_waiting, table.num_under_way, evaluation.answers) == (2, 0, {})
    assert [table.next_for(0, tick=0).request_id for _ in range(2)] == [1, 2]


def test_a_request_id_in_use_is_refused():
    table = Evaluations(total_slots=8)
    table.start([request(1)], share=1.0)
    with pytest.raises(ValueError, match="in use"):
        table.start([request(1), request(3)], share=1.0)
    with pytest.raises(ValueError, match="used once"):
        table.start([request(2), request(2)], share=1.0)


# --------------------------------------------------------------------------------------------- behind real sockets


@scenario
async def test_evaluation_goes_ahead_of_leases_and_uses_up_credits(tmp_path):
    async with serving(tmp_path, total_slots=4) as server:
        worker = FakeWorker(server)
        await worker.join()
        evaluating = asyncio.create_task(server.evaluate([eval_request(1), eval_request(2)], share=0.5))
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


@scenario
async def test_evaluation_requests_of_a_lost_worker_are_given_to_another(tmp_path):
    async with serving(tmp_path) as server:
        doomed, other = FakeWorker(server, 0, "first"), FakeWorker(server, 1)
        await doomed.join()
        await doomed.ask(1)
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)], share=1.0))
        await doomed.take(EvalRequest)
        assert "1 evaluation requests are open" in server.status()["why_waiting"]
        await other.join()
        await other.ask(1)
        await FakeWorker(server, 0, "second").join()
        await other.evaluate(await other.take(EvalRequest))
        assert len(await evaluating) == 2


@scenario
async def test_an_evaluation_request_that_a_live_worker_never_answers_is_given_out_again(tmp_path):
    async with serving(tmp_path, heartbeat_s=TICK_S, lease_stall_s=2 * TICK_S) as server:
        worker = FakeWorker(server)
        await worker.join()
        await worker.ask(2)
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)], share=1.0))
        await worker.take(EvalRequest)
        await worker.evaluate(await worker.take(EvalRequest))
        assert len(await evaluating) == 2


@scenario
async def test_an_evaluation_request_that_was_lost_is_sent_again_and_takes_no_second_credit(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        await worker.ask(1)
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)], share=1.0))
        lost = await worker.take(EvalRequest)
        await worker.beat()
        await worker.beat()
        assert await worker.take(EvalRequest) == lost
        for _ in range(3):
            await worker.beat(evaluations=[1])
        assert await worker.unread() == []
        await worker.evaluate(lost)
        assert len(await evaluating) == 2


@scenario
async def test_a_repeated_evaluation_answer_is_acknowledged_and_counts_once(tmp_path):
    async with serving(tmp_path) as server:
        worker, learner = FakeWorker(server), FakeLearner(server)
        await worker.join()
        evaluating = asyncio.create_task(server.evaluate([eval_request(1), eval_request(2)], share=1.0))
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


@scenario
async def test_an_evaluation_that_is_given_up_leaves_nothing_behind(tmp_path):
    async with serving(tmp_path) as server:
        worker = FakeWorker(server)
        await worker.join()
        evaluating = asyncio.create_task(server.evaluate([eval_request(1)], share=1.0))
        await asyncio.sleep(0)
        evaluating.cancel()
        await asyncio.gather(evaluating, return_exceptions=True)
        await worker.ask(1)
        assert await worker.unread() == []
        assert server.status()["evaluations_waiting"] == 0
