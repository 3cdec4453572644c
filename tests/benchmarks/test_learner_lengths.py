"""Lengths of a bench's sequences: the task's own, seeded, or as asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.errors import ConfigError
from asyncdapo.model.files import TokenizerFiles
from asyncdapo.model.tokenizer import load_tokenizer
from asyncdapo.prompts.tasks.chain import apply, draw_chain
from benchmarks.learner_step.lengths import LINE_TOKENS, draw_lengths, prompt_tokens, solution_tokens
from benchmarks.learner_step.options import quickstart_model

KINDS = st.sampled_from(["quickstart", "mixed", "mixed:300", "fixed:40"])


def test_the_formulas_count_what_the_shipped_tokenizer_counts() -> None:
    tokenizer = load_tokenizer(TokenizerFiles(str(quickstart_model())))
    for row in range(20):
        chain = draw_chain(3, row, held_out=False)
        value, solution = chain.digits[0], ""
        for operator, digit in zip(chain.operators, chain.digits[1:], strict=True):
            solution += f"{value}{operator}{digit}={(value := apply(operator, value, digit))}\n"
        prompt, both = tokenizer.encode(chain.prompt), tokenizer.encode(f"{chain.prompt}{solution}Answer: {value}")
        assert len(prompt) == prompt_tokens(chain)
        assert len(both) - len(prompt) + 1 == solution_tokens(chain), "with the token that ends it"


def test_the_quickstarts_lengths_are_those_of_its_chains_a_few_responses_aside() -> None:
    groups = draw_lengths("quickstart", 16, 16, seed=5)
    chains = [draw_chain(5, row, held_out=False) for row in range(16)]
    assert [group.num_prompt for group in groups] == [prompt_tokens(chain) for chain in chains]
    off = [
        num_tokens - solution_tokens(chain)
        for group, chain in zip(groups, chains, strict=True)
        for num_tokens in group.num_responses_G
    ]
    assert sum(difference == 0 for difference in off) > 0.9 * len(off)
    assert any(off)
    assert all(difference % LINE_TOKENS == 0 for difference in off)


@given(name=KINDS, num_groups=st.integers(1, 6), group_size=st.integers(2, 8), seed=st.integers(0, 99))
def test_a_seed_gives_the_same_batch_with_a_token_in_every_part(name, num_groups, group_size, seed) -> None:
    groups = draw_lengths(name, num_groups, group_size, seed)
    assert groups == draw_lengths(name, num_groups, group_size, seed)
    assert [len(group.num_responses_G) for group in groups] == [group_size] * num_groups
    assert all(group.num_prompt >= 1 and min(group.num_responses_G) >= 1 for group in groups)


def test_another_seed_gives_other_lengths() -> None:
    for name in ("quickstart", "mixed"):
        assert draw_lengths(name, 8, 4, seed=0) != draw_lengths(name, 8, 4, seed=1)


@given(num_groups=st.integers(1, 6), group_size=st.integers(2, 8), seed=st.integers(0, 99))
def test_mixed_lengths_have_the_mean_that_was_asked_for(num_groups, group_size, seed) -> None:
    num_tokens = sum(group.num_tokens for group in draw_lengths("mixed:500", num_groups, group_size, seed))
    assert num_tokens == pytest.approx(500 * num_groups * group_size, rel=0.01)


def test_fixed_lengths_are_all_the_same() -> None:
    sequences = {num for group in draw_lengths("fixed:64", 3, 4, seed=0) for num in group.sequences}
    assert sequences == {64}


@pytest.mark.parametrize("name", ["long", "fixed", "fixed:", "fixed:3", "mixed:ten", "quickstart:5"])
def test_lengths_that_are_not_known_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--lengths"):
        draw_lengths(name, 2, 2, seed=0)
