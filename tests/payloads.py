"""Payloads of several groups as one, for tests that change or compare them as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asyncdapo.messages import Group
from asyncdapo.transport.payload import Payload, Support


def joined(payloads: Sequence[Payload]) -> Payload:
    """The buffers one after the other."""
    columns = zip(*((part.prompt_ids, part.token_ids, part.logprobs) for part in payloads), strict=True)
    support = Support.join([(part.support, len(part.logprobs)) for part in payloads])
    return Payload(*map(np.concatenate, columns), support=support)


def split(payload: Payload, groups: Sequence[Group]) -> list[Payload]:
    """Of joined ones, that of each group."""
    ends = np.cumsum([(one.num_prompt_tokens, one.num_tokens, one.num_sampled_tokens) for one in groups], axis=0)
    prompts, tokens, logprobs = (
        np.split(buffer, column[:-1])
        for buffer, column in zip((payload.prompt_ids, payload.token_ids, payload.logprobs), ends.T, strict=True)
    )
    runs = [slice(end - len(part), end) for part, end in zip(logprobs, ends[:, 2], strict=True)]
    supports = payload.support.pieces(runs) if payload.support else [None] * len(groups)
    return [Payload(*parts) for parts in zip(prompts, tokens, logprobs, supports, strict=True)]
