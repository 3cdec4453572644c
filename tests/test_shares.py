"""How a batch is dealt to optimizer updates and ranks."""

from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.shares import deal, share_of
from tests.learner.tiny import make_group


def group(lengths, masked=()):
    masks = [[(int(index not in masked), length)] for index, length in enumerate(lengths)]
    return make_group(0, 3, lengths, [0.0] * len(lengths), loss_masks=masks)


groups_of = st.lists(
    st.tuples(st.lists(st.integers(1, 50), min_size=2, max_size=2), st.booleans()).map(
        lambda drawn: group(drawn[0], masked={0, 1} if drawn[1] else {0})
    ),
    max_size=12,
)


@given(groups=groups_of, num_updates=st.integers(1, 5), num_ranks=st.integers(1, 5))
def test_every_group_with_a_loss_token_is_dealt_once_and_no_other(groups, num_updates, num_ranks):
    dealt = deal(groups, num_updates=num_updates, num_ranks=num_ranks)
    flat = [index for by_rank in dealt for share in by_rank for index in share]
    assert sorted(flat) == [index for index, one in enumerate(groups) if one.num_loss_tokens]
    shares = [share_of(dealt, rank) for rank in range(num_ranks)]
    assert sorted(sum(shares, [])) == sorted(flat)


@given(groups=groups_of, num_updates=st.integers(1, 5), num_ranks=st.integers(1, 5))
def test_which_groups_an_update_holds_does_not_depend_on_the_ranks(groups, num_updates, num_ranks):
    alone = deal(groups, num_updates=num_updates, num_ranks=1)
    dealt = deal(groups, num_updates=num_updates, num_ranks=num_ranks)
    assert [sorted(sum(by_rank, [])) for by_rank in dealt] == [share for [share] in alone]


def test_ranks_get_nearly_equal_numbers_of_tokens():
    groups = [group([length, length]) for length in (40, 1, 2, 30, 3, 29, 38, 4)]
    [by_rank] = deal(groups, num_updates=1, num_ranks=2)
    loads = [sum(groups[index].num_tokens for index in share) for share in by_rank]
    assert abs(loads[0] - loads[1]) <= 8


def test_long_sequences_weigh_more_than_as_many_tokens_in_short_ones():
    groups = [group([20_000, 20_000]), *(group([500] * 40) for _ in range(3))]
    [by_rank] = deal(groups, num_updates=1, num_ranks=2)
    assert by_rank == [[0], [1, 2, 3]]  # by tokens alone: 60,000 and 40,000


def test_with_fewer_groups_than_ranks_some_have_none():
    assert deal([group([5, 5])], num_updates=1, num_ranks=3) == [[[0], [], []]]
