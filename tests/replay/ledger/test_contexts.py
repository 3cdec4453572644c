"""Records of episodes: sound ones have no problem, and each planted fault is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncdapo.messages import Completion, Context, Group, SampledTurn
from asyncdapo.replay.ledger.contexts import header_problem, token_problem
from asyncdapo.transport.payload import Payload, checksum
from tests.episodes import Episodes, MadeContext

Made = list[list[MadeContext]]


def problem_of(group: Group, payload: Payload) -> str | None:
    """As validation and audit look for it."""
    return next(filter(None, map(header_problem, group.completions)), None) or token_problem(group, payload)


@given(st.integers(0, 1 << 32))
def test_episodes_as_they_were_sampled_have_no_problem(seed: int) -> None:
    assert problem_of(*Episodes(seed, versions=(0, 3)).group()) is None


def two_turns(episodes: Made) -> MadeContext:
    """The first context, made anew."""
    context = episodes[0][0]
    context.__init__(context.prompt_ids)
    context.sample(0, [1, 2, 3], [-0.5, -0.25, -0.125], [(0, 3)])
    context.observe([9, 8])
    context.sample(1, [4, 5], [-1.0, -2.0], [(1, 2)])
    del episodes[0][1:]
    return context


def retokenise(episodes: Made) -> None:
    """Another spelling of the same text between two turns: the second one was sampled behind another."""
    two_turns(episodes).token_ids[1:3] = [7, 6]


def retokenise_before_the_second_turn(episodes: Made) -> None:
    """The engine was given another spelling of its first turn than it had sampled."""
    context = two_turns(episodes)
    read = [*context.prompt_ids, 1, 7, 6, 9, 8, 4, 5]
    context.turns[1] = SampledTurn(1, 2, checksum(read, 1))


def leave_out_an_observation(episodes: Made) -> None:
    context = two_turns(episodes)
    del context.token_ids[3:5], context.sampled[1]


def change_the_last_token(episodes: Made) -> None:
    two_turns(episodes).token_ids[-1] += 1


def fork(episodes: Made, first: int, second: int) -> MadeContext:
    """The first turn stands in a fork, too, with these numbers of its turns."""
    context = MadeContext(two_turns(episodes).prompt_ids)
    context.sample(first, [1, 2, 3], [-0.5, -0.25, -0.125], [(0, 3)])
    context.observe([9, 9])
    context.sample(second, [4, 5], [-1.0, -2.0], [(1, 2)])
    episodes[0].append(context)
    return context


def sample_a_turn_in_two_contexts(episodes: Made) -> None:
    fork(episodes, 0, 2)


def sample_a_turn_in_two_contexts_under_a_new_number(episodes: Made) -> None:
    """The checksum can't be had from the engine, which has sampled it once."""
    context = fork(episodes, 0, 2)
    context.turns = [SampledTurn(3, 3, context.turns[0].checksum), *context.turns[1:]]


def leave_out_a_context(episodes: Made) -> None:
    context = fork(episodes, 2, 3)
    context.observe([1])
    context.sample(5, [4], [-1.0], [(1, 1)])


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (retokenise, "turn 0 was sampled behind other tokens"),
        (retokenise_before_the_second_turn, "turn 1 was sampled behind other tokens"),
        (leave_out_an_observation, "turn 1 was sampled behind other tokens"),
        (change_the_last_token, "turn 1 was sampled behind other tokens"),
        (sample_a_turn_in_two_contexts, "numbered [0, 0, 1, 2]: one is missing, or in two places"),
        (sample_a_turn_in_two_contexts_under_a_new_number, "completion 0: turn 3 was sampled behind other tokens"),
        (leave_out_a_context, "numbered [0, 1, 2, 3, 5]: one is missing, or in two places"),
    ],
)
def test_tokens_that_are_not_what_was_sampled_are_found(harm, problem: str) -> None:
    found = problem_of(*Episodes(0).group(change=harm))
    assert found is not None
    assert problem in found


def test_two_draws_of_the_same_tokens_are_two_turns() -> None:
    """An agent may ask twice."""
    assert problem_of(*Episodes(0).group(change=lambda episodes: fork(episodes, 2, 3))) is None


SOUND = Context(
    sampled=[(1, 2), (0, 3), (1, 1)],
    versions=[(0, 3)],
    loss_mask=[(1, 3)],
    turns=[SampledTurn(0, 2, 7), SampledTurn(1, 1, 8)],
)


def completion(context: Context) -> Completion:
    return Completion(contexts=[context], finish_reason="stop", reward=0.0, metrics={})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"loss_mask": [(1, 6)]}, "the run lengths of loss_mask"),  # observed tokens bear loss
        ({"loss_mask": [(1, 2), (0, 3), (1, 1)]}, "the run lengths of loss_mask"),
        ({"versions": [(0, 6)]}, "the run lengths of versions"),
        ({"versions": [(0, 4), (1, -1)]}, "the run lengths of versions"),
        ({"turns": [SampledTurn(0, 3, 7)]}, "have observed tokens inside"),
        ({"turns": [SampledTurn(0, 1, 7), SampledTurn(1, 2, 8)]}, "have observed tokens inside"),
        ({"turns": [SampledTurn(0, 2, 7)]}, "the run lengths of turns"),
        ({"turns": [SampledTurn(0, 2, 7), SampledTurn(-1, 1, 8)]}, "one is missing"),
        ({"sampled": [(1, 2), (0, 3), (1, 1), (0, 1)]}, "doesn't end in a sampled token"),
        ({"sampled": [(1, 3), (0, 0)]}, "doesn't end in a sampled token"),
        ({"sampled": [(2, 2), (0, 3), (1, 1)]}, "values other than 0 and 1"),
        ({"rooted": False}, "no prompt of its own"),
    ],
)
def test_a_header_that_contradicts_itself_is_found(change: dict, problem: str) -> None:
    assert header_problem(completion(SOUND)) is None
    assert problem in (header_problem(completion(replace(SOUND, **change))) or "")
