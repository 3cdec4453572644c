"""Payloads of episodes: every token and log-prob is found again where its context has it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.messages import GroupDone
from asyncdapo.transport.codec import decode, encode
from asyncdapo.transport.payload import Payload, Support, expand
from tests.episodes import Episodes, MadeContext, narrowed

seeds = st.integers(0, 1 << 32)


def made(seed: int):
    """A group, its payload, and its contexts as they were made; of every second one sampling was narrowed."""
    kept: list[list[MadeContext]] = []
    group, payload = Episodes(seed, versions=(0, 3)).group(change=kept.extend)
    return group, narrowed(group, payload, seed) if seed % 2 else payload, kept


@given(seeds)
def test_the_contexts_of_a_group_come_back_from_its_frames(seed: int) -> None:
    group, payload, kept = made(seed)
    message, buffers = decode(encode(GroupDone(group=group), payload.frames()), GroupDone)
    found = list(Payload.from_frames(buffers, [message.group]).of_contexts(message.group))
    places = [(index, number) for index, contexts in enumerate(kept) for number in range(len(contexts))]
    assert [(tokens.index, tokens.number) for tokens in found] == places
    for tokens, context in zip(found, sum(kept, start=[]), strict=True):
        assert tokens.own_ids.tolist() == context.token_ids
        assert tokens.logprobs_S.tolist() == np.array(context.logprobs, np.float32).tolist()
        whole = [*(payload.prompt_ids.tolist() if context.rooted else []), *context.token_ids]
        assert [*tokens.prompt_ids, *tokens.own_ids[tokens.response]] == whole
        is_sampled = [bool(value) for value, count in context.sampled for _ in range(count)]
        assert tokens.is_sampled.tolist() == is_sampled
        versions = tokens.spread(expand(tokens.header.versions), observed=-1)
        assert [version >= 0 for version in versions] == is_sampled
        assert versions[is_sampled].tolist() == expand(context.versions).tolist()


@given(seeds)
def test_a_part_of_a_payload_has_the_tokens_of_its_completions(seed: int) -> None:
    one, of_one, _ = made(seed)
    of_last = of_one.of_completions(one, [len(one.completions) - 1])
    last = [tokens for tokens in of_one.of_contexts(one) if tokens.index == len(one.completions) - 1]
    assert of_last.token_ids.tolist() == np.concatenate([tokens.own_ids for tokens in last]).tolist()
    assert of_last.logprobs.tolist() == np.concatenate([tokens.logprobs_S for tokens in last]).tolist()


@given(seeds)
def test_what_a_token_was_drawn_from_stays_with_it(seed: int) -> None:
    group, payload, _ = made(seed | 1)
    read = Payload.from_frames(payload.frames(), [group])
    parts = list(read.of_contexts(group))
    last = read.of_completions(group, [len(group.completions) - 1])
    assert Support.join([(part.support_S, len(part.logprobs_S)) for part in parts]) is not None
    for tokens in parts:
        assert tokens.support_S is not None
        assert tokens.support_S.problem(tokens.own_ids[tokens.is_sampled]) is None
        every_second = np.arange(len(tokens.logprobs_S)) % 2 == 0
        some = tokens.support_S.of(every_second)
        assert some.problem(tokens.own_ids[tokens.is_sampled][every_second]) is None
        assert len(some.token_ids) == some.counts.sum()
    of_last = [part.support_S.token_ids for part in parts if part.index == len(group.completions) - 1]
    assert last.support.token_ids.tolist() == np.concatenate(of_last).tolist()


@pytest.mark.parametrize("harm", ["a count more", "a token less", "a negative count", "a frame less"])
def test_frames_of_what_was_drawn_from_that_contradict_each_other_are_refused(harm: str) -> None:
    group, payload, _ = made(1)
    counts, token_ids = payload.support.counts.copy(), payload.support.token_ids
    if harm == "a negative count":
        counts[:2] = -1, counts[:2].sum() + 1
    support = Support(counts[:-1] if harm == "a count more" else counts, token_ids[: -1 if "token" in harm else None])
    frames = replace(payload, support=support).frames()
    with pytest.raises(ValueError, match=r"to draw from|3 or 5 frames"):
        Payload.from_frames(frames[:4] if harm == "a frame less" else frames, [group])


@given(seeds)
def test_counts_and_versions_of_a_group_are_those_of_all_its_contexts(seed: int) -> None:
    group, payload, kept = made(seed)
    contexts = sum(kept, start=[])
    versions = [version for context in contexts for version, _ in context.versions]
    assert (group.min_version, group.max_version) == (min(versions), max(versions))
    assert group.num_tokens == len(payload.token_ids)
    assert group.num_sampled_tokens == len(payload.logprobs)
    assert [one.num_turns for one in group.completions] == [sum(len(c.turns) for c in own) for own in kept]


def test_frames_that_hold_a_log_prob_for_observed_tokens_too_are_refused() -> None:
    group, payload, _ = made(1)
    assert group.num_sampled_tokens < group.num_tokens
    too_many = Payload(payload.prompt_ids, payload.token_ids, np.zeros(group.num_tokens, np.float32))
    with pytest.raises(ValueError, match="sampled ones"):
        Payload.from_frames(too_many.frames(), [group])


def test_frames_are_the_memory_of_the_payload_and_a_group_that_goes_whole_is_not_copied() -> None:
    group, payload, _ = made(2)
    buffers = (payload.prompt_ids, payload.token_ids, payload.logprobs)
    for buffer, frame in zip(buffers, payload.frames(), strict=True):
        assert np.shares_memory(buffer, np.frombuffer(frame, np.uint8))
    assert payload.of_completions(group, range(len(group.completions))) is payload
