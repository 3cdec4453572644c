"""The learner's end of the wire, against a real socket that plays the replay server, and real segments."""

import asyncio
import threading

import pytest
from msgspec.structs import replace

from asyncdapo.errors import BatchError, RunError
from asyncdapo.learner.batches import feed as feed_module
from asyncdapo.learner.batches.feed import MAX_DAMAGED, BatchFeed, read_share
from asyncdapo.messages import Welcome
from asyncdapo.records.record import PAYLOAD_FOLDER, segment_path
from asyncdapo.shares import CutWanted, NoBatch, share_of
from asyncdapo.transport.sockets import Server
from tests.asynchronous import TEST_TIMEOUT_S
from tests.learner.tiny import batch_of, make_batch, payloads_of, stored
from tests.payloads import joined, split


def serve(answer, run_dir, step=1, ask_again_s=0.1, **rank):
    """Take `step` from a server that calls `answer(server, peer, number of the question)` for each question."""

    async def run():
        server = Server(CutWanted)
        feed = BatchFeed(server.address, run_dir, **rank, ask_again_s=ask_again_s)
        questions = []

        async def answer_all():
            while True:
                peer, message, _ = await server.receive()
                questions.append(message)
                await answer(server, peer, len(questions))

        answering = asyncio.create_task(answer_all())
        try:
            async with asyncio.timeout(TEST_TIMEOUT_S):
                taken = await feed.take(step)
                if not isinstance(taken, NoBatch):
                    batch, share = taken
                    taken = batch, await feed.read(step, share)
                assert all(question == CutWanted(step=question.step, **rank) for question in questions)
                return taken, [question.step for question in questions]
        finally:
            answering.cancel()
            feed.close()
            server.close()

    return asyncio.run(run())


def always(batch):
    async def answer(server, peer, nth):
        await server.send(peer, batch)

    return answer


def test_a_batch_arrives_as_it_was_sent_with_the_tokens_that_were_stored(tmp_path):
    batch, payload = make_batch(step=1)
    batch = stored(tmp_path, batch, payload)
    (got, got_payloads), questions = serve(always(batch), tmp_path, ask_again_s=20)
    assert got == batch
    assert joined(got_payloads).frames() == payload.frames()
    assert questions == [1]


def test_records_come_in_the_order_of_the_batch_wherever_they_are(tmp_path):
    """Groups arrive in another order than that of their prompts, and end up in several segments."""
    batch, payload = make_batch(step=1, num_groups=7)
    parts = split(payload, batch.groups)
    places = {}
    for order in ([4, 1, 6], [3], [5, 0, 2]):
        groups = [batch.groups[place] for place in order]
        some = stored(tmp_path, batch_of(groups), joined([parts[place] for place in order]))
        places |= dict(zip(order, some.places, strict=True))
    batch = replace(batch, places=[place for _, place in sorted(places.items())])
    assert len({place.segment for place in batch.places}) == 3
    (_, got_payloads), _ = serve(always(batch), tmp_path, ask_again_s=20)
    assert joined(got_payloads).frames() == payload.frames()


def test_a_rank_has_all_headers_and_the_tokens_of_its_completions(tmp_path):
    batch, payload = make_batch(step=1, num_groups=7)
    batch = stored(tmp_path, batch_of(batch.groups, num_ranks=3, num_updates=2), payload)
    for rank in range(3):
        own = payloads_of(batch, payload, rank)
        assert 0 < joined(own).num_bytes < payload.num_bytes
        (got, got_payloads), _ = serve(always(batch), tmp_path, ask_again_s=20, rank=rank)
        assert got == batch
        assert [one.frames() for one in got_payloads] == [one.frames() for one in own]


def test_a_rank_without_a_completion_has_an_empty_share_and_reads_nothing(tmp_path):
    batch, payload = make_batch(step=1, num_groups=1)
    batch = stored(tmp_path, batch, payload)
    segment_path(tmp_path / PAYLOAD_FOLDER, 1).unlink()
    assert share_of(batch, 1) == []
    (got, got_payloads), _ = serve(always(batch), tmp_path, ask_again_s=20, rank=1)
    assert got == batch
    assert got_payloads == []


def test_it_asks_again_until_there_is_an_answer(tmp_path):
    batch = stored(tmp_path, *make_batch(step=3))

    async def answer(server, peer, nth):
        if nth == 4:
            await server.send(peer, batch)

    (got, _), questions = serve(answer, tmp_path, step=3)
    assert got == batch
    assert questions == [3, 3, 3, 3]


def test_a_late_answer_to_an_earlier_question_is_passed_over(tmp_path):
    earlier, batch = stored(tmp_path, *make_batch(step=1)), stored(tmp_path, *make_batch(step=2, seed=1))

    async def answer(server, peer, nth):
        for answered in (earlier, earlier, batch):
            await server.send(peer, answered)

    (got, _), _ = serve(answer, tmp_path, step=2, ask_again_s=20)
    assert got == batch


def test_the_end_of_the_data_is_an_answer_without_a_batch(tmp_path):
    no_batch = NoBatch(step=2, reason="the data is used up")
    got, questions = serve(always(no_batch), tmp_path, step=2, ask_again_s=20)
    assert got == no_batch
    assert questions == [2]


def test_a_damaged_answer_is_asked_for_again(tmp_path):
    batch = stored(tmp_path, *make_batch(step=1))

    async def answer(server, peer, nth):
        if nth == 1:
            await server.send(peer, Welcome(branch=0, granted=0))
        elif nth == 2:
            await server.send(peer, replace(batch, places=batch.places[:2]))
        else:
            await server.send(peer, batch)

    (got, _), questions = serve(answer, tmp_path, ask_again_s=20)
    assert got == batch
    assert questions == [1, 1, 1]


def test_damage_again_and_again_ends_the_run(tmp_path):
    batch = stored(tmp_path, *make_batch(step=1))
    harmed = replace(batch, places=batch.places[1:])
    with pytest.raises(RunError, match=f"arrived damaged {MAX_DAMAGED} times in a row: 3 places for 4 groups"):
        serve(always(harmed), tmp_path, ask_again_s=20)


def test_reading_takes_as_long_as_it_takes_and_the_loop_goes_on(tmp_path, monkeypatch):
    batch = stored(tmp_path, *make_batch(step=1))
    may_end, reads = threading.Event(), []

    def slow(*args):
        reads.append(args)
        assert may_end.wait(20), "the loop stands still"
        return read_share(*args)

    monkeypatch.setattr(feed_module, "read_share", slow)

    async def answer(server, peer, nth):
        await server.send(peer, batch)
        while not reads:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        may_end.set()

    (got, _), _ = serve(answer, tmp_path, ask_again_s=0.05)
    assert got == batch
    assert len(reads) == 1, "it was given up and begun again"


# ------------------------------------------------------------------------------------------ what can't be read back


def test_a_batch_whose_headers_the_server_cannot_read_is_an_error_of_its_own(tmp_path):
    with pytest.raises(BatchError, match="batch 1 can't be read back: why"):
        serve(always(NoBatch(step=1, reason="batch 1 can't be read back: why", unreadable=True)), tmp_path)


@pytest.mark.parametrize(("harm", "said"), [("bytes", "its tokens are damaged"), ("file", "No such file")])
def test_a_record_that_cannot_be_read_is_the_same_error_and_names_its_file(tmp_path, harm, said):
    batch = stored(tmp_path, *make_batch(step=1))
    segment = segment_path(tmp_path / PAYLOAD_FOLDER, 1)
    content = bytearray(segment.read_bytes())
    content[batch.places[2].end - 1] ^= 1
    segment.write_bytes(content)
    if harm == "file":
        segment.unlink()
    with pytest.raises(BatchError, match=rf"batch 1 can't be read back from {tmp_path}: payloads/000001\.bin.*{said}"):
        serve(always(batch), tmp_path, ask_again_s=20)


def test_the_record_of_another_group_is_found(tmp_path):
    batch = stored(tmp_path, *make_batch(step=1))
    first, second, *others = batch.places
    with pytest.raises(BatchError, match="it is of group 0, not of group 1"):
        serve(always(replace(batch, places=[second, first, *others])), tmp_path, ask_again_s=20)
