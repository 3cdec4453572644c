"""Groups that contradict themselves or their lease are rejected, and change nothing."""

import msgspec
import numpy as np
import pytest

from asyncdapo.messages import NO_CHECKSUM, Reject, SampledTurn
from asyncdapo.transport.payload import Payload
from tests.asynchronous import asynchronous
from tests.replay.serving import FakeWorker, rows, serving
from tests.replay.small_run import make_group

VOCAB_SIZE = 1 << 20


def with_completion(group, **changes):
    """The group with its first completion changed."""
    first, *rest = group.completions
    return msgspec.structs.replace(group, completions=[msgspec.structs.replace(first, **changes), *rest])


def with_context(group, **changes):
    """The group with the context of its first completion changed."""
    return with_completion(group, contexts=[msgspec.structs.replace(group.completions[0].contexts[0], **changes)])


def with_logprob(payload, value):
    logprobs = payload.logprobs.copy()
    logprobs[3] = value
    return Payload(payload.prompt_ids, payload.token_ids, logprobs)


BAD_GROUPS = {
    "another prompt": lambda g, p: (msgspec.structs.replace(g, prompt_id=5), p),
    "another attempt": lambda g, p: (msgspec.structs.replace(g, attempt=2), p),
    "another branch": lambda g, p: (msgspec.structs.replace(g, branch=1), p),
    "another worker": lambda g, p: (msgspec.structs.replace(g, worker=3), p),
    "one completion": lambda g, p: (msgspec.structs.replace(g, completions=g.completions[:1]), p),
    "no completion": lambda g, p: (msgspec.structs.replace(g, completions=[]), p),
    "no context": lambda g, p: (with_completion(g, contexts=[]), p),
    "an empty context": lambda g, p: (with_context(g, sampled=[], versions=[], loss_mask=[], turns=[]), p),
    "an observed token at the end": lambda g, p: (with_context(g, sampled=[(1, 4), (0, 1)]), p),
    "no prompt of its own": lambda g, p: (with_context(g, rooted=False), p),
    "versions too short": lambda g, p: (with_context(g, versions=[(0, 3)]), p),
    "a negative run": lambda g, p: (with_context(g, versions=[(0, 5), (0, -1)]), p),
    "a mask too long": lambda g, p: (with_context(g, loss_mask=[(1, 5)]), p),
    "a mask of 2": lambda g, p: (with_context(g, loss_mask=[(2, 4)]), p),
    "weights of the future": lambda g, p: (with_context(g, versions=[(1, 4)]), p),
    "a negative version": lambda g, p: (with_context(g, versions=[(-1, 4)]), p),
    "a turn without a checksum": lambda g, p: (with_context(g, turns=[SampledTurn(0, 4, NO_CHECKSUM)]), p),
    "a turn of another number": lambda g, p: (with_context(g, turns=[SampledTurn(1, 4, 7)]), p),
    "another turn than was sampled": lambda g, p: (with_context(g, turns=[SampledTurn(0, 4, 7)]), p),
    "a reward that is no number": lambda g, p: (with_completion(g, reward=float("nan")), p),
    "a metric that is no number": lambda g, p: (with_completion(g, metrics={"acc": float("inf")}), p),
    "a time that is no number": lambda g, p: (msgspec.structs.replace(g, generate_s=float("nan")), p),
    "a log-prob that is no number": lambda g, p: (g, with_logprob(p, np.nan)),
    "a log-prob above 0": lambda g, p: (g, with_logprob(p, 0.5)),
    "an infinite log-prob": lambda g, p: (g, with_logprob(p, -np.inf)),
    "a negative token": lambda g, p: (g, Payload(p.prompt_ids, -1 - p.token_ids, p.logprobs)),
    "a token beyond the vocabulary": lambda g, p: (g, Payload(p.prompt_ids, p.token_ids + VOCAB_SIZE, p.logprobs)),
    "other prompt tokens": lambda g, p: (g, Payload(p.prompt_ids + 1, p.token_ids, p.logprobs)),
    "a token too few": lambda g, p: (g, Payload(p.prompt_ids, p.token_ids[:-1], p.logprobs)),
}


@pytest.mark.parametrize("what", BAD_GROUPS)
@asynchronous
async def test_a_group_that_contradicts_itself_or_its_lease_is_rejected(tmp_path, what):
    async with serving(tmp_path, server_settings={"vocab_size": VOCAB_SIZE}) as server:
        worker = FakeWorker(server)
        await worker.join()
        await server.begin()
        lease, _ = await worker.leases(2)
        await worker.send_group(*BAD_GROUPS[what](*make_group(lease)))
        reject = await worker.take(Reject)
        assert reject.lease_id == lease.lease_id
        assert rows(tmp_path, "SELECT lease_id, detail FROM events WHERE kind = 'rejected'") == [
            (lease.lease_id, reject.reason)
        ]
        assert rows(tmp_path, "SELECT state, attempts FROM prompts WHERE prompt_id = 0")[0][1] == 1
        assert rows(tmp_path, "SELECT COUNT(*) FROM groups") == [(0,)]
