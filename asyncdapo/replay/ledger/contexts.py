"""Contexts: does the record of a completion hold what it says of its turns?

In: headers and tokens of a group, as they arrive and as an audit reads them. Out: what is wrong, in words for people.
What is shown, for each context of each completion:

    observed tokens     bear no loss: versions, loss mask and turns are of the sampled tokens alone. None stands inside
                        of a turn
    exact prefixes      each turn was sampled behind exactly the tokens that stand before it, and is what was sampled:
                        the checksum that was taken at the engine is that of the tokens here
    once                no sampled token is in two contexts, so none bears loss twice. Equal tokens are the same token
                        if all tokens before them are equal, and they were drawn with the same log-prob

Does not own: whether the group is what its lease asked for (`validate`).
"""

from __future__ import annotations

from itertools import accumulate, combinations
from zlib import crc32

import numpy as np

from asyncdapo.messages import NO_CHECKSUM, Completion, Context, Group
from asyncdapo.transport.payload import ContextTokens, Payload


def header_problem(completion: Completion) -> str | None:
    """What is wrong with the header alone. Buffers can be read by one without a problem."""
    if not completion.contexts:
        return "it has no context"
    return next(filter(None, map(_context_problem, completion.contexts)), None)


def _context_problem(context: Context) -> str | None:
    sampled, num_sampled = context.sampled, context.num_sampled_tokens
    for name, runs in (("sampled", sampled), ("loss_mask", context.loss_mask)):
        if any(value not in (0, 1) for value, _ in runs):
            return f"{name} {runs} has values other than 0 and 1"
    if not sampled or sampled[-1][0] == 0 or any(count < 1 for _, count in sampled):
        return f"sampled {sampled} doesn't end in a sampled token"
    if not context.rooted and sampled[0][0]:
        return f"sampled {sampled} has no prompt of its own to begin with"
    of_sampled = {"versions": context.versions, "loss_mask": context.loss_mask, "checksums": context.checksums}
    for name, runs in of_sampled.items():
        if any(count < 1 for _, count in runs) or sum(count for _, count in runs) != num_sampled:
            return f"the run lengths of {name} are {runs} for {num_sampled} sampled tokens"
    ends = set(accumulate(count for _, count in context.checksums))
    if not ends.issuperset(accumulate(count for value, count in sampled if value)):
        return f"turns {context.checksums} have observed tokens inside: sampled {sampled}"
    return None


def token_problem(group: Group, payload: Payload) -> str | None:
    """What is wrong with the tokens of a group whose headers have no problem."""
    completions: dict[int, list[ContextTokens]] = {}
    for tokens in payload.of_contexts(group):
        completions.setdefault(tokens.index, []).append(tokens)
        if not _is_exact(tokens):
            return f"completion {tokens.index}: a turn was sampled behind other tokens, or is another one"
    for index, contexts in completions.items():
        if num := sum(_num_same(*pair) for pair in combinations(contexts, 2)):
            return f"completion {index}: {num} sampled tokens are in two contexts"
    return None


def _is_exact(tokens: ContextTokens) -> bool:
    """Whether every turn has the checksum that was taken at the engine."""
    ends = np.flatnonzero(tokens.is_sampled)[np.cumsum([count for _, count in tokens.header.checksums]) - 1] + 1
    crc, begin = crc32(tokens.group_prompt_ids.tobytes()) if tokens.header.rooted else 0, 0
    for (taken, _), end in zip(tokens.header.checksums, ends.tolist(), strict=True):
        crc, begin = crc32(tokens.own_ids[begin:end].tobytes(), crc), end
        if taken not in (crc, NO_CHECKSUM):
            return False
    return True


def _num_same(one: ContextTokens, other: ContextTokens) -> int:
    """Sampled tokens that two contexts of a completion have in common."""
    if one.header.rooted != other.header.rooted:
        return 0
    length = min(len(one.own_ids), len(other.own_ids))
    different = np.flatnonzero(one.own_ids[:length] != other.own_ids[:length])
    length = int(different[0]) if len(different) else length
    both = one.is_sampled[:length] & other.is_sampled[:length]
    drawn = [tokens.logprobs_S[np.cumsum(tokens.is_sampled)[:length][both] - 1] for tokens in (one, other)]
    return int((drawn[0] == drawn[1]).sum())
