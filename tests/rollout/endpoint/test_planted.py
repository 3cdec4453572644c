"""Faults planted into the records of a program's episode: the checks of replay server and audit find each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from msgspec.structs import replace

from asyncdapo.messages import Context, Group, Score
from asyncdapo.replay.ledger.contexts import header_problem, token_problem
from asyncdapo.rollout.groups import build_group
from asyncdapo.transport.payload import Payload
from tests.asynchronous import asynchronous
from tests.rollout.endpoint.test_chat import TOKENIZER, agent, conversing, raw
from tests.rollout.fakes import make_lease


async def recorded(*, strips: bool) -> tuple[Group, Payload]:
    """An episode of two turns."""
    async with conversing() as (it, _), raw(it) as say:
        await agent(say, strips=strips)
        episode = it.attempt.episode("stop", 1.0, {})
    return build_group(make_lease(7, group_size=1), 0, [episode], [Score(reward=1.0, metrics={})], 0.1)


def changed(group: Group, change: Callable[[list[Context]], list[Context]]) -> Group:
    [completion] = group.completions
    return replace(group, completions=[replace(completion, contexts=change(completion.contexts))])


@asynchronous
async def test_a_turn_that_was_tokenised_again() -> None:
    group, payload = await recorded(strips=False)
    [one] = payload.of_contexts(group)
    first = one.header.turns[0].num_tokens
    begin = one.header.sampled[0][1]
    again = TOKENIZER.encode_more(TOKENIZER.spell(one.own_ids[begin : begin + first].tolist()))
    assert len(again) < first
    turns = [replace(one.header.turns[0], num_tokens=len(again)), one.header.turns[1]]
    sampled = [one.header.sampled[0], (1, len(again)), *one.header.sampled[2:]]
    num_sampled = one.header.num_sampled_tokens - first + len(again)
    shorter = replace(
        one.header, turns=turns, sampled=sampled, versions=[(0, num_sampled)], loss_mask=[(1, num_sampled)]
    )
    token_ids = np.concatenate([one.own_ids[:begin], again, one.own_ids[begin + first :]]).astype(np.int32)
    planted = changed(group, lambda _: [shorter])
    assert header_problem(planted.completions[0]) is None
    words = token_problem(planted, Payload(payload.prompt_ids, token_ids, payload.logprobs[:num_sampled]))
    assert words == "completion 0: turn 0 was sampled behind other tokens, or is another one"


@asynchronous
async def test_a_shared_turn_that_would_bear_loss_in_both_contexts() -> None:
    group, payload = await recorded(strips=True)
    assert token_problem(group, payload) is None

    def share(contexts: list[Context]) -> list[Context]:
        first, second = contexts
        return [first, replace(second, turns=[first.turns[0], *second.turns])]

    words = header_problem(changed(group, share).completions[0])
    assert words == "its turns are numbered [0, 0, 1]: one is missing, or in two places"


@pytest.mark.parametrize("numbers", [(1, 0), (0, 0), (0, 2)])
@asynchronous
async def test_turns_whose_numbers_were_swapped_repeated_or_skipped(numbers: tuple[int, int]) -> None:
    group, payload = await recorded(strips=True)

    def renumber(contexts: list[Context]) -> list[Context]:
        pairs = zip(contexts, numbers, strict=True)
        return [replace(one, turns=[replace(one.turns[0], number=number)]) for one, number in pairs]

    planted = changed(group, renumber)
    assert header_problem(planted.completions[0]) or token_problem(planted, payload)


@asynchronous
async def test_an_observed_token_that_would_bear_loss() -> None:
    group, _ = await recorded(strips=False)

    def bear(contexts: list[Context]) -> list[Context]:
        [context] = contexts
        begun, *_ = context.sampled
        return [replace(context, sampled=[begun, (1, context.num_tokens - begun[1])])]

    assert "run lengths of versions" in str(header_problem(changed(group, bear).completions[0]))
