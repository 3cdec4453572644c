"""Compiled attention is the rectangles' in float32, forward and backward, and gives way to them without a compiler."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.learner.attention import attention, compiled_attention
from asyncdapo.learner.attention.attention import packed_attention
from asyncdapo.learner.attention.attention_layout import Layout
from tests.learner.tiny import needs_c_compiler

CPU = torch.device("cpu")
GROUPS = st.lists(
    st.tuples(st.integers(1, 45), st.lists(st.integers(0, 70), min_size=1, max_size=4)), min_size=1, max_size=3
)


def layout_of(groups) -> Layout:
    """Of (prompt, responses) in tokens."""
    columns, end = [], 0
    for num_prompt, nums in groups:
        prompt, end = end, end + num_prompt
        for num in nums:
            columns.append((prompt, num_prompt, end, num))
            end += num
    return Layout(*np.array(columns).T, CPU)


def inputs(layout, num_heads=4, num_kv_heads=2, head_dim=8, spread=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(layout.num_tokens)
    return [
        (spread * torch.randn(1, heads, layout.num_tokens, head_dim, generator=generator)).to(dtype).requires_grad_()
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]


def results(layout, leaves, **options):
    """What attention gives, and the gradients of what goes in."""
    out, _ = packed_attention(None, *leaves, None, layout=layout, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def in_float64(layout, leaves, **options):
    return results(layout, [leaf.detach().double().requires_grad_() for leaf in leaves], **options)


def assert_close(got, expected, tolerance=5e-6):
    for part, reference in zip(got, expected, strict=True):
        scale = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(part.double(), reference, rtol=0, atol=tolerance * scale)


@pytest.fixture
def calls(monkeypatch):
    """The sizes of what was computed by the C file."""
    seen, own = [], compiled_attention.compiled_attention
    monkeypatch.setattr(attention, "compiled_attention", lambda *args: seen.append(args[0].shape) or own(*args))
    return seen


@needs_c_compiler
@given(GROUPS, st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1)]), st.sampled_from([8, 40]))
@settings(max_examples=25, deadline=None)
def test_values_and_gradients_are_those_of_the_rectangles_in_float64(groups, heads, head_dim):
    layout = layout_of(groups)
    leaves = inputs(layout, *heads, head_dim)
    assert_close(results(layout, leaves, scaling=0.3), in_float64(layout, leaves, scaling=0.3))


@needs_c_compiler
def test_long_sequences_of_large_scores_come_out_right(calls):
    layout = layout_of([(300, [260, 1]), (1, [400])])
    leaves = inputs(layout, spread=3.0)
    assert_close(results(layout, leaves), in_float64(layout, leaves))
    assert calls == [(962, 4, 8)]


@needs_c_compiler
def test_results_depend_neither_on_threads_nor_on_other_sequences_to_the_last_bit():
    layout = layout_of([(20, [33, 50, 7]), (5, [64])])
    leaves = inputs(layout)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(layout, leaves)
        torch.set_num_threads(3)
        three = results(layout, leaves)
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    first = layout_of([(20, [33, 50, 7])])
    alone, _ = packed_attention(None, *(leaf[:, :, : first.num_tokens] for leaf in leaves), None, layout=first)
    assert torch.equal(alone[0], one[0][0, : first.num_tokens])


@needs_c_compiler
def test_what_is_not_a_number_stays_in_its_own_sequence():
    layout = layout_of([(3, [4, 5]), (2, [6])])
    leaves = inputs(layout)
    with torch.no_grad():
        leaves[2][:, :, 4] = torch.nan
    out = results(layout, leaves)[0]
    assert {4, 5, 6} <= set(out[0].isnan().flatten(1).any(-1).nonzero().flatten().tolist()) <= {3, 4, 5, 6}


@needs_c_compiler
@pytest.mark.parametrize(
    ("dtype", "window", "max_tokens", "compiled"),
    [
        (torch.float32, None, 12, True),
        (torch.float32, 12, 12, True),
        (torch.float32, 11, 12, False),
        (torch.float32, None, 11, False),
        (torch.float64, None, 12, False),
        (torch.bfloat16, None, 12, False),
    ],
)
def test_it_is_for_float32_and_sequences_that_no_window_cuts(calls, monkeypatch, dtype, window, max_tokens, compiled):
    monkeypatch.setattr(compiled_attention, "MAX_TOKENS", max_tokens)
    layout = layout_of([(5, [7, 2])])
    results(layout, inputs(layout, dtype=dtype), sliding_window=window)
    assert bool(calls) == compiled


def test_without_a_compiler_the_rectangles_compute_and_a_line_says_so(calls, monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    compiled_attention._library.cache_clear()
    layout = layout_of([(5, [7, 2])])
    leaves = inputs(layout)
    assert_close(results(layout, leaves), in_float64(layout, leaves))
    assert not calls
    assert "no-such-compiler" in caplog.text
    compiled_attention._library.cache_clear()
