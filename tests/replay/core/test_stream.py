"""How long the answers to a row were is known in its next epoch, also to a server that is started again."""

from __future__ import annotations

from asyncdapo.messages import Ack
from asyncdapo.replay.core.stream import AnswerLengths
from asyncdapo.replay.ledger.journal import Journal
from tests.replay.serving import FakeWorker, scenario, serving
from tests.replay.small_run import prompt_at

EPOCH = 100
"""Rows of it."""


def row_at(prompt_id):
    prompt = prompt_at(prompt_id)
    return prompt.source, prompt.row


@scenario
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
