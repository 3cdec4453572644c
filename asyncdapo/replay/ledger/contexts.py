"""Contexts: does the record of a completion hold what it says of its turns?

In: headers and tokens of a group, as they arrive and as an audit reads them. Out: what is wrong, in words for people.
What is shown, for each context of each completion:

    observed tokens     bear no loss: versions, loss mask and turns are of the sampled tokens alone. None stands inside
                        of a turn
    exact prefixes      each turn was sampled behind exactly the tokens that stand before it, and is what was sampled:
                        the checksum that was taken at the engine is that of the tokens here
    once                each turn stands in one context, so none of its tokens bears loss twice: turns are numbered, and
                        a checksum is of the number, too
    drawn               where sampling was narrowed, each token is among those that it was drawn from

Does not own: whether the group is what its lease asked for (`arrivals`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from isal.isal_zlib import crc32

from asyncdapo.messages import NO_CHECKSUM, Completion, Context, Group, SampledTurn
from asyncdapo.transport.payload import Payload, numbered

NO_OR_YES = frozenset((0, 1))


def header_problem(completion: Completion) -> str | None:
    """What is wrong with the header alone. Buffers can be read by one without a problem."""
    if _is_one_turn(completion):
        return None
    if not completion.contexts:
        return "it has no context"
    numbers = sorted([turn.number for context in completion.contexts for turn in context.turns])
    if numbers != list(range(len(numbers))):
        return f"its turns are numbered {numbers}: one is missing, or in two places"
    return next(filter(None, map(_context_problem, completion.contexts)), None)


def _is_one_turn(completion: Completion) -> bool:
    """Whether it is a single turn, and sound. Most are, and this takes a fraction of the time."""
    if not len(completion.contexts) == 1 == len(completion.contexts[0].turns):
        return False
    context = completion.contexts[0]
    turn, counts = context.turns[0], [count for _, count in context.versions]
    return (
        (context.rooted and turn.number == 0)
        and context.sampled == [(1, turn.num_tokens)]
        and context.loss_mask in ([(1, turn.num_tokens)], [(0, turn.num_tokens)])
        and (min(counts, default=0) > 0 and sum(counts) == turn.num_tokens)
    )


def _context_problem(context: Context) -> str | None:
    sampled, num_sampled = context.sampled, context.num_sampled_tokens
    for name, runs in (("sampled", sampled), ("loss_mask", context.loss_mask)):
        if not NO_OR_YES.issuperset([value for value, _ in runs]):
            return f"{name} {runs} has values other than 0 and 1"
    if not sampled or sampled[-1][0] == 0 or any(count < 1 for _, count in sampled):
        return f"sampled {sampled} doesn't end in a sampled token"
    if not context.rooted and sampled[0][0]:
        return f"sampled {sampled} has no prompt of its own to begin with"
    turns = [turn.num_tokens for turn in context.turns]
    of_sampled = {
        "versions": [count for _, count in context.versions],
        "loss_mask": [count for _, count in context.loss_mask],
        "turns": turns,
    }
    for name, counts in of_sampled.items():
        if min(counts, default=0) < 1 or sum(counts) != num_sampled:
            return f"the run lengths of {name} are {counts} for {num_sampled} sampled tokens"
    if not set(accumulate(turns)).issuperset(accumulate(count for value, count in sampled if value)):
        return f"turns of {turns} tokens have observed tokens inside: sampled {sampled}"
    return None


def token_problem(group: Group, payload: Payload) -> str | None:
    """What is wrong with the tokens of a group whose headers have no problem."""
    crc, token_ids, end = crc32(payload.prompt_ids.data), payload.token_ids.data, 0
    for index, completion in enumerate(group.completions):
        for context in completion.contexts:
            begin, end = end, end + context.num_tokens
            if (number := _other_turn(context, token_ids[begin:end], crc)) is not None:
                return f"completion {index}: turn {number} was sampled behind other tokens, or is another one"
    for tokens in payload.of_contexts(group) if payload.support else ():
        if tokens.support_S and (problem := tokens.support_S.problem(tokens.own_ids[tokens.is_sampled])):
            return f"completion {tokens.index}: {problem}"
    return None


def _other_turn(context: Context, own_ids: memoryview, crc_of_prompt: int) -> int | None:
    """Number of the first turn that hasn't the checksum that was taken at the engine; None if all have theirs.
    `own_ids`: the context's tokens."""
    crc, begin = crc_of_prompt if context.rooted else 0, 0
    for turn, end in _turns(context):
        crc, begin = crc32(own_ids[begin:end], crc), end
        if turn.checksum not in (numbered(crc, turn.number), NO_CHECKSUM):
            return turn.number
    return None


def _turns(context: Context) -> Iterator[tuple[SampledTurn, int]]:
    """Each turn, and where among the context's tokens it ends."""
    at, turns = 0, iter(context.turns)
    for is_sampled, count in context.sampled:
        end = at + count
        while is_sampled and at < end:
            turn = next(turns)
            at += turn.num_tokens
            yield turn, at
        at = end
