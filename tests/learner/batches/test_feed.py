"""The learner's end of the wire, against a real socket that plays the replay server."""

import asyncio

import numpy as np
import pytest

from asyncdapo.errors import BatchError, RunError
from asyncdapo.learner.batches.feed import MAX_DAMAGED, BatchFeed
from asyncdapo.messages import Welcome
from asyncdapo.shares import CutWanted, NoBatch, share_of
from asyncdapo.transport.codec import BATCH_LIMITS
from asyncdapo.transport.sockets import Server
from tests.learner.tiny import batch_of, make_batch, payload_of, sent_frames


def serve(answer, step=1, ask_again_s=0.1, **rank):
    """Take `step` from a server that calls `answer(server, peer, number of the question)` for each question."""

    async def run():
        server = Server(CutWanted, limits=BATCH_LIMITS)
        feed = BatchFeed(server.address, **rank, ask_again_s=ask_again_s)
        questions = []

        async def answer_all():
            while True:
                peer, message, _ = await server.receive()
                questions.append(message)
                await answer(server, peer, len(questions))

        answering = asyncio.create_task(answer_all())
        try:
            async with asyncio.timeout(20):
                taken = await feed.take(step)
                assert all(question == CutWanted(step=question.step, **rank) for question in questions)
                return taken, [question.step for question in questions]
        finally:
            answering.cancel()
            feed.close()
            server.close()

    return asyncio.run(run())


def test_a_batch_arrives_as_it_was_sent():
    batch, payload = make_batch(step=1)

    async def answer(server, peer, nth):
        await server.send(peer, batch, sent_frames(batch, payload))

    (got, got_payload), questions = serve(answer, ask_again_s=20)
    assert got == batch
    assert np.array_equal(got_payload.prompt_ids, payload.prompt_ids)
    assert np.array_equal(got_payload.token_ids, payload.token_ids)
    assert np.array_equal(got_payload.logprobs, payload.logprobs)
    assert questions == [1]


def test_a_rank_asks_for_its_share_and_has_all_headers_with_the_payload_of_its_completions():
    batch, payload = make_batch(step=1, num_groups=7)
    batch = batch_of(batch.groups, num_ranks=3, num_updates=2)
    for rank in range(3):
        sent = payload_of(batch, payload, rank)
        assert 0 < sent.num_bytes < payload.num_bytes

        async def answer(server, peer, nth, rank=rank):
            await server.send(peer, batch, sent_frames(batch, payload, rank))

        (got, got_payload), _ = serve(answer, ask_again_s=20, rank=rank)
        assert got == batch
        assert got_payload.frames() == sent.frames()


def test_a_rank_without_a_completion_has_an_empty_share():
    batch, _ = make_batch(step=1, num_groups=1)
    assert share_of(batch, 1) == []

    async def answer(server, peer, nth):
        await server.send(peer, batch)

    (got, got_payload), _ = serve(answer, ask_again_s=20, rank=1)
    assert got == batch
    assert got_payload.num_bytes == 0


def test_it_asks_again_until_there_is_an_answer():
    batch, payload = make_batch(step=3)

    async def answer(server, peer, nth):
        if nth == 4:
            await server.send(peer, batch, sent_frames(batch, payload))

    (got, _), questions = serve(answer, step=3)
    assert got == batch
    assert questions == [3, 3, 3, 3]


def test_a_late_answer_to_an_earlier_question_is_passed_over():
    earlier, batch = make_batch(step=1), make_batch(step=2, seed=1)

    async def answer(server, peer, nth):
        for answered, payload in (earlier, earlier, batch):
            await server.send(peer, answered, sent_frames(answered, payload))

    (got, _), _ = serve(answer, step=2, ask_again_s=20)
    assert got == batch[0]


def test_the_end_of_the_data_is_an_answer_without_a_batch():
    async def answer(server, peer, nth):
        await server.send(peer, NoBatch(step=2, reason="the data is used up"))

    got, questions = serve(answer, step=2, ask_again_s=20)
    assert got == NoBatch(step=2, reason="the data is used up")
    assert questions == [2]


def test_a_damaged_answer_is_asked_for_again():
    batch, payload = make_batch(step=1)

    async def answer(server, peer, nth):
        if nth == 1:
            await server.send(peer, Welcome(branch=0, granted=0))
        elif nth == 2:
            await server.send(peer, batch, sent_frames(batch, payload)[:2])
        else:
            await server.send(peer, batch, sent_frames(batch, payload))

    (got, _), questions = serve(answer, ask_again_s=20)
    assert got == batch
    assert questions == [1, 1, 1]


def test_a_batch_that_the_server_cannot_read_back_is_an_error_of_its_own():
    async def answer(server, peer, nth):
        await server.send(peer, NoBatch(step=1, reason="batch 1 can't be read back: why", unreadable=True))

    with pytest.raises(BatchError, match="batch 1 can't be read back: why"):
        serve(answer, ask_again_s=20)


def test_damage_again_and_again_ends_the_run():
    batch, payload = make_batch(step=1)

    async def answer(server, peer, nth):
        await server.send(peer, batch, (b"1234", *sent_frames(batch, payload)[1:]))

    with pytest.raises(RunError, match=f"batch 1 arrived damaged {MAX_DAMAGED} times in a row: payload frames of"):
        serve(answer, ask_again_s=20)
