"""A layout says which tokens are a sequence: as rectangles and as segments the same."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.learner.attention import attention_layout as layout_module
from asyncdapo.learner.attention.attention_layout import Layout
from asyncdapo.learner.model.packing import pack
from tests.learner.tiny import make_row

CPU = torch.device("cpu")
GROUPS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=4)), min_size=1, max_size=5
)


def layout_of(groups) -> Layout:
    rows = [make_row(num_prompt, num, prompt=at) for at, (num_prompt, nums) in enumerate(groups) for num in nums]
    return pack(rows, CPU).layout


def keys_by_definition(layout: Layout) -> list[set[int]]:
    """The tokens that each token attends to."""
    seen: list[set[int]] = [set() for _ in range(layout.num_tokens)]
    rows = zip(layout.prompt_starts_B, layout.num_prompt_B, layout.starts_B, layout.num_behind_B, strict=True)
    for prompt_start, num_prompt, start, num_behind in rows:
        sequence = [*range(prompt_start, prompt_start + num_prompt), *range(start, start + num_behind)]
        for place, token in enumerate(sequence):
            seen[token] = set(sequence[: place + 1])
    return seen


@given(GROUPS)
def test_rectangles_show_every_token_its_own_sequence_up_to_itself(groups):
    layout = layout_of(groups)
    cells = torch.cat([gather.flatten() for gather in layout.rectangles.gathers])
    lines = [line for gather in layout.rectangles.gathers for line in gather for _ in line]
    places = [place for gather in layout.rectangles.gathers for line in gather for place in range(len(line))]
    expected = keys_by_definition(layout)
    for token, cell in enumerate(layout.rectangles.back_S.tolist()):
        assert cells[cell] == token
        assert set(lines[cell][: places[cell] + 1].tolist()) == expected[token]


@given(GROUPS)
def test_segments_aligned_at_their_ends_show_every_token_its_own_sequence_up_to_itself(groups):
    layout = layout_of(groups)
    segments = layout.segments
    keys_K = torch.arange(layout.num_tokens) if segments.keys_K is None else segments.keys_K
    ends = zip(segments.ends_of_queries.tolist(), segments.ends_of_keys.tolist(), strict=True)
    (first_query, first_key), *ends = ends
    expected = keys_by_definition(layout)
    queries = 0
    for last_query, last_key in ends:
        for behind, query in enumerate(reversed(range(first_query, last_query))):
            assert set(keys_K[first_key : last_key - behind].tolist()) == expected[query]
            queries += 1
        assert 0 < last_query - first_query <= segments.max_queries
        assert last_key - first_key <= segments.max_keys
        first_query, first_key = last_query, last_key
    assert queries == layout.num_tokens


@given(GROUPS)
def test_pairs_are_those_of_the_definition(groups):
    layout = layout_of(groups)
    assert layout.num_pairs == sum(map(len, keys_by_definition(layout)))


def test_keys_are_gathered_only_where_a_prompt_is_shared():
    assert layout_of([(3, [4]), (2, [5])]).segments.keys_K is None
    assert layout_of([(3, [4, 1]), (2, [5])]).segments.keys_K is not None


def test_sequences_of_very_different_lengths_stand_in_rectangles_of_their_own(monkeypatch):
    lengths = [(1, [100]), (1, [99]), (1, [10]), (1, [11])]
    monkeypatch.setattr(layout_module, "RECTANGLE_PAIRS", 5_000)
    assert sorted(gather.shape[0] for gather in layout_of(lengths).rectangles.gathers) == [2, 2]
    monkeypatch.setattr(layout_module, "RECTANGLE_PAIRS", 10**9)
    assert [gather.shape for gather in layout_of(lengths).rectangles.gathers] == [(4, 100)]


def test_positions_count_from_the_beginning_of_the_prompt():
    layout = Layout(np.array([0, 0]), np.array([2, 2]), np.array([2, 5]), np.array([3, 1]), CPU)
    assert layout.positions().tolist() == [0, 1, 2, 3, 4, 2]
