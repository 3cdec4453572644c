"""The stream of prompts: each once a window after the other, and how long answers are is known in the next epoch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.messages import Ack
from asyncdapo.replay.core.stream import AnswerLengths, PromptStream
from asyncdapo.replay.ledger.journal import Journal
from tests.asynchronous import asynchronous
from tests.replay.serving import FakeWorker, serving
from tests.replay.small_run import prompt_at

EPOCH = 100
"""Rows of it."""


def row_at(prompt_id):
    prompt = prompt_at(prompt_id)
    return prompt.source, prompt.row


@asynchronous
async def test_the_latest_answers_to_a_row_foretell_the_next_and_the_ledger_knows_them_too(tmp_path):
    lengths = AnswerLengths({}, row_at)
    num_tokens = {0: 3, 1: 9}
    async with serving(tmp_path, lengths=lengths) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        for lease in await worker.leases(2):
            await worker.answer(lease, versions=((0, num_tokens[lease.prompt.prompt_id]),))
            await worker.take(Ack)
    journal = Journal(tmp_path)
    read_again = AnswerLengths(journal.answer_lengths(), row_at)
    journal.close()
    for known in (lengths, read_again):
        assert [known.expected(EPOCH + row) for row in range(3)] == [3.0, 9.0, 0.0]


@given(
    num_prompts=st.one_of(st.none(), st.integers(1, 20)),
    size=st.integers(1, 6),
    lengths=st.lists(st.integers(0, 9), min_size=20, max_size=20),
    choices=st.lists(st.sampled_from(["take", "take", "back", "behind"]), max_size=40),
)
def test_longest_first_takes_every_prompt_once_a_window_after_the_other(num_prompts, size, lengths, choices) -> None:
    stream = PromptStream(num_prompts, size, expected_tokens=lambda prompt_id: lengths[prompt_id % 20])
    first: list[int] = []
    held: list[int] = []
    for choice in choices:
        if choice == "take" and stream.next is not None:
            held.append(stream.take())
            first += [held[-1]] if held[-1] not in first else []
        elif held:
            (stream.put_back if choice == "back" else stream.put_behind)(held.pop())
        assert not held or len(set(held)) == len(held)
    windows = [first[begin : begin + size] for begin in range(0, len(first), size)]
    for number, window in enumerate(windows):
        end = (number + 1) * size if num_prompts is None else min((number + 1) * size, num_prompts)
        whole = sorted(range(number * size, end), key=lambda prompt_id: (-lengths[prompt_id % 20], prompt_id))
        assert window == whole[: len(window)]


def test_a_prompt_that_was_passed_over_keeps_its_place_when_the_stream_is_read_again() -> None:
    stream = PromptStream(num_prompts=None, delay=4, num_fresh=3, places={0: 0, 1: 1})
    assert [stream.take() for _ in range(4)] == [0, 1, 3, 4]
