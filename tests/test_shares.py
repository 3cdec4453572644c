"""How a batch is dealt to optimizer updates and ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncdapo.messages import Context, SampledTurn
from asyncdapo.model.shape import PUBLISHED, read_shape
from asyncdapo.shares import NOBODY, Dealer, share_of
from tests.learner.tiny import batch_of, make_group

QWEN_7B = read_shape(PUBLISHED["Qwen/Qwen2.5-7B"])


def group(lengths, masked=(), num_prompt_tokens=3):
    masks = [[(int(index not in masked), length)] for index, length in enumerate(lengths)]
    return make_group(0, num_prompt_tokens, lengths, [0.0] * len(lengths), loss_masks=masks)


def loss_bearing(groups):
    return [
        (place, index)
        for place, one in enumerate(groups)
        for index, completion in enumerate(one.completions)
        if completion.num_loss_tokens
    ]


def flops(share):
    """Of a forward pass of the 7B shape over a rank's share, a prompt counted once."""
    total = 0
    for piece in share:
        num_prompt = piece.header.num_prompt_tokens
        total += QWEN_7B.forward_flops(num_prompt, 0, num_prompt * (num_prompt + 1) // 2)
        for length in (completion.num_tokens for completion in piece.header.completions):
            total += QWEN_7B.forward_flops(length, length, length * num_prompt + length * (length + 1) // 2)
    return total


def balance(groups, num_ranks):
    """The work if no prompt were computed twice and all ranks had equal parts, beside that of the busiest rank."""
    batch = batch_of(groups, num_ranks=num_ranks, pair_cost=QWEN_7B.pair_cost)
    busiest = max(flops(share_of(batch, rank)) for rank in range(num_ranks))
    return flops(share_of(batch_of(groups), 0)) / num_ranks / busiest


one_group = st.builds(
    lambda drawn, num_prompt: group(
        [length for length, _ in drawn], {index for index, (_, masked) in enumerate(drawn) if masked}, num_prompt
    ),
    st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=5),
    st.integers(1, 30),
)
groups_of = st.lists(one_group, max_size=12)
dealers = st.builds(Dealer, st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.0, 1e-5, 0.1]))


@given(groups=groups_of, dealer=dealers)
def test_every_loss_bearing_completion_is_at_one_rank_and_no_other_is_at_any(groups, dealer):
    batch = replace(batch_of(groups), deal=dealer.deal(groups))
    shares = [share_of(batch, rank) for rank in range(dealer.num_ranks)]
    dealt = [(piece.place, index) for share in shares for piece in share for index in piece.indices]
    assert sorted(dealt) == loss_bearing(groups)
    for piece in sum(shares, []):
        assert piece.indices == sorted(piece.indices)
        assert piece.header.completions == [groups[piece.place].completions[index] for index in piece.indices]


@given(groups=groups_of, dealer=dealers)
def test_the_same_headers_give_the_same_deal(groups, dealer):
    copies = [replace(one, completions=list(one.completions)) for one in groups]
    assert dealer.deal(groups) == dealer.deal(copies)


@given(groups=groups_of, dealer=dealers)
def test_which_groups_an_update_holds_depends_on_no_rank_and_no_model(groups, dealer):
    assert dealer.deal(groups).updates == Dealer(num_updates=dealer.num_updates).deal(groups).updates


@given(groups=groups_of, num_updates=st.integers(1, 5))
def test_updates_hold_consecutive_groups_with_loss_equally_many_but_for_one(groups, num_updates):
    deal = Dealer(num_updates=num_updates).deal(groups)
    assert [update == NOBODY for update in deal.updates] == [not one.num_loss_tokens for one in groups]
    held = [update for update in deal.updates if update != NOBODY]
    assert held == sorted(held)
    assert deal.num_updates == min(num_updates, len(held))
    sizes = [held.count(number) for number in range(deal.num_updates)]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


@given(groups=groups_of.filter(loss_bearing), num_ranks=st.integers(1, 5))
def test_no_rank_has_more_than_an_even_part_and_one_completion(groups, num_ranks):
    """In tokens, where attention costs nothing and no prompt counts."""
    groups = [replace(one, num_prompt_tokens=0) for one in groups]
    batch = batch_of(groups, num_ranks=num_ranks)
    loads = [sum(piece.header.num_tokens for piece in share_of(batch, rank)) for rank in range(num_ranks)]
    longest = max(groups[place].completions[index].num_tokens for place, index in loss_bearing(groups))
    assert max(loads) <= 1.01 * (sum(loads) / num_ranks + longest)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_ranks", [8, 16, 32])
def test_ranks_are_even_on_the_long_answers_of_a_large_model(seed, num_ranks):
    """An update of the paper's recipe: 32 groups of 16, most answers short, some as long as allowed."""
    draw = np.random.default_rng(seed)
    lengths = np.minimum(20_000, draw.lognormal(np.log(4_000), 1.0, (32, 16))).astype(int).tolist()
    groups = [group(of_group, num_prompt_tokens=int(draw.integers(50, 400))) for of_group in lengths]
    assert balance(groups, num_ranks) >= 0.95


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_are_even_on_the_answers_of_the_quickstart(seed, num_ranks):
    """Lengths as in its ledger: alike in a group, from 13 to 112 tokens over the groups; prompts of 8 to 40."""
    draw = np.random.default_rng(seed)
    typical = np.clip(draw.lognormal(np.log(39), 0.55, 16), 13, 112)
    groups = [
        group(draw.integers(int(length) - 1, int(length) + 2, 16).tolist(), num_prompt_tokens=int(draw.integers(8, 41)))
        for length in typical
    ]
    assert balance(groups, num_ranks) >= 0.95


def test_few_groups_are_cut():
    """So few prompts are computed, and sent, twice."""
    draw = np.random.default_rng(0)
    groups = [group(draw.integers(100, 4_000, 16).tolist()) for _ in range(32)]
    batch = batch_of(groups, num_ranks=32)
    assert sum(len(share_of(batch, rank)) for rank in range(32)) <= 32 + 32


def test_a_long_sequence_weighs_more_than_as_many_tokens_in_short_ones():
    groups = [group([20_000]), group([500] * 120)]

    def tokens_at_each_rank(pair_cost):
        batch = batch_of(groups, num_ranks=2, pair_cost=pair_cost)
        return sorted(sum(piece.header.num_tokens for piece in share_of(batch, rank)) for rank in range(2))

    assert tokens_at_each_rank(0.0) == [40_000, 40_000]
    assert tokens_at_each_rank(1e-4) == [30_500, 49_500]  # the long one counts 40,000, a short one 512


def test_with_fewer_completions_than_ranks_some_ranks_have_none():
    batch = batch_of([group([5, 5])], num_ranks=3)
    assert [[piece.indices for piece in share_of(batch, rank)] for rank in range(3)] == [[[0]], [[1]], []]


def test_the_work_of_an_episode_counts_what_it_observes():
    """90 tokens that the first one reads weigh as much as 90 that another one writes."""
    turn = SampledTurn(0, 10, 7)
    context = Context(sampled=[(0, 90), (1, 10)], versions=[(0, 10)], loss_mask=[(1, 10)], turns=[turn])
    short = group([10, 50, 50])
    episode = replace(short.completions[0], contexts=[context])
    long = replace(short, completions=[episode, *short.completions[1:]])
    assert batch_of([short], num_ranks=2).deal.ranks[1] != batch_of([short], num_ranks=2).deal.ranks[2]
    first, *others = batch_of([long], num_ranks=2).deal.ranks
    assert others == [1 - first, 1 - first]
