"""Records of episodes: sound ones have no problem, and each planted fault is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncdapo.messages import Completion, Context, Group
from asyncdapo.replay.ledger.contexts import header_problem, token_problem
from asyncdapo.transport.payload import Payload
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
    context.sample([1, 2, 3], [-0.5, -0.25, -0.125], [(0, 3)])
    context.observe([9, 8])
    context.sample([4, 5], [-1.0, -2.0], [(1, 2)])
    del episodes[0][1:]
    return context


def retokenise(episodes: Made) -> None:
    """Another spelling of the same text between two turns: the second one was sampled behind another."""
    two_turns(episodes).token_ids[1:3] = [7, 6]


def retokenise_before_the_second_turn(episodes: Made) -> None:
    """The engine was given another spelling of its first turn than it had sampled, and that is recorded."""
    context = two_turns(episodes)
    told = [*context.prompt_ids, 1, 7, 6, 9, 8, 4, 5]
    engine = MadeContext([])
    engine.sample(told, [0.0] * 7, [])
    context.checksums[1] = (engine.checksums[0][0], 2)


def leave_out_an_observation(episodes: Made) -> None:
    context = two_turns(episodes)
    del context.token_ids[3:5], context.sampled[1]


def change_the_last_token(episodes: Made) -> None:
    two_turns(episodes).token_ids[-1] += 1


def sample_a_turn_in_two_contexts(episodes: Made) -> None:
    first = two_turns(episodes)
    fork = MadeContext(first.prompt_ids)
    fork.sample([1, 2, 3], [-0.5, -0.25, -0.125], [(0, 3)])
    fork.observe([9, 9])
    fork.sample([4, 5], [-1.0, -2.0], [(1, 2)])
    episodes[0].append(fork)


def sample_half_a_turn_in_two_contexts(episodes: Made) -> None:
    first = two_turns(episodes)
    fork = MadeContext(first.prompt_ids)
    fork.sample([1, 2], [-0.5, -0.25], [(0, 2)])
    fork.observe([9, 9])
    fork.sample([4, 5], [-1.0, -2.0], [(1, 2)])
    episodes[0].append(fork)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (retokenise, "a turn was sampled behind other tokens"),
        (retokenise_before_the_second_turn, "a turn was sampled behind other tokens"),
        (leave_out_an_observation, "a turn was sampled behind other tokens"),
        (change_the_last_token, "a turn was sampled behind other tokens"),
        (sample_a_turn_in_two_contexts, "completion 0: 3 sampled tokens are in two contexts"),
        (sample_half_a_turn_in_two_contexts, "completion 0: 2 sampled tokens are in two contexts"),
    ],
)
def test_tokens_that_are_not_what_was_sampled_are_found(harm, problem: str) -> None:
    found = problem_of(*Episodes(0).group(change=harm))
    assert found is not None
    assert problem in found


def test_two_draws_of_the_same_tokens_are_two_turns() -> None:
    """An agent may ask twice. Their log-probs differ, since the weights or the rounding did."""

    def ask_twice(episodes: Made) -> None:
        first = two_turns(episodes)
        again = MadeContext(first.prompt_ids)
        again.sample([1, 2, 3], [-0.51, -0.26, -0.13], [(1, 3)])
        episodes[0].append(again)

    assert problem_of(*Episodes(0).group(change=ask_twice)) is None


SOUND = Context(sampled=[(1, 2), (0, 3), (1, 1)], versions=[(0, 3)], loss_mask=[(1, 3)], checksums=[(7, 2), (8, 1)])


def completion(context: Context) -> Completion:
    return Completion(contexts=[context], finish_reason="stop", reward=0.0, metrics={})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"loss_mask": [(1, 6)]}, "the run lengths of loss_mask"),  # observed tokens bear loss
        ({"loss_mask": [(1, 2), (0, 3), (1, 1)]}, "the run lengths of loss_mask"),
        ({"versions": [(0, 6)]}, "the run lengths of versions"),
        ({"versions": [(0, 4), (1, -1)]}, "the run lengths of versions"),
        ({"checksums": [(7, 3)]}, "have observed tokens inside"),
        ({"checksums": [(7, 1), (8, 2)]}, "have observed tokens inside"),
        ({"checksums": [(7, 2)]}, "the run lengths of checksums"),
        ({"sampled": [(1, 2), (0, 3), (1, 1), (0, 1)]}, "doesn't end in a sampled token"),
        ({"sampled": [(1, 3), (0, 0)]}, "doesn't end in a sampled token"),
        ({"sampled": [(2, 2), (0, 3), (1, 1)]}, "values other than 0 and 1"),
        ({"rooted": False}, "no prompt of its own"),
    ],
)
def test_a_header_that_contradicts_itself_is_found(change: dict, problem: str) -> None:
    assert header_problem(completion(SOUND)) is None
    assert problem in (header_problem(completion(replace(SOUND, **change))) or "")
