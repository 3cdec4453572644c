"""Log-probs in chunks against the plain computation: values, gradients, and what is never held in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.learner.model import logprobs
from asyncdapo.learner.model.logprobs import linear_logprobs
from tests.learner.model.logprob_cases import Allocations, assert_close, inputs, plain, run
from tests.learner.tiny import needs_compiler


@pytest.fixture
def cut(monkeypatch):
    """Sets the sizes of a chunk."""

    def cut(elements, columns, alignment=1):
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", {"cpu": elements})
        monkeypatch.setattr(logprobs, "COLUMNS", columns)
        monkeypatch.setattr(logprobs, "ALIGNMENT", alignment)

    return cut


@given(
    num_tokens=st.integers(0, 17),
    size=st.integers(1, 9),
    num_columns=st.integers(1, 40),
    elements=st.integers(1, 200),
    columns=st.integers(1, 50),
    alignment=st.sampled_from([1, 4]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    bias=st.booleans(),
    entropy_gradient=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_values_and_gradients_are_the_plain_ones_whatever_the_shapes_and_chunks(
    num_tokens, size, num_columns, elements, columns, alignment, temperature, bias, entropy_gradient, seed
):
    case = inputs(num_tokens, size, num_columns, bias=bias, seed=seed)
    options = {"temperature": temperature, "entropy_gradient": entropy_gradient, "seed": seed}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CHUNK_ELEMENTS", {"cpu": elements})
        patch.setattr(logprobs, "COLUMNS", columns)
        patch.setattr(logprobs, "ALIGNMENT", alignment)
        got = run(linear_logprobs, *case, **options)
    assert_close(got, run(plain, *case, **options), 1e-12)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_gradients_are_those_of_finite_differences(cut, entropy_gradient):
    cut(12, 4)
    *leaves, targets_N = inputs(spread=1.0)

    def function(hidden_NH, weight_VH, bias_V):
        logp_N, entropy_N = linear_logprobs(
            hidden_NH, weight_VH, targets_N, temperature=0.8, bias_V=bias_V, entropy_gradient=entropy_gradient
        )
        return (logp_N, entropy_N) if entropy_gradient else logp_N

    assert torch.autograd.gradcheck(function, leaves)


def test_entropy_carries_a_gradient_only_when_asked_for():
    hidden_NH, weight_VH, _, targets_N = inputs(bias=False)
    assert not linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=1.0)[1].requires_grad
    assert linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=1.0, entropy_gradient=True)[1].requires_grad


def test_the_gradient_of_the_entropy_alone_is_the_plain_one():
    hidden_NH, weight_VH, _, targets_N = inputs(bias=False)
    options = {"temperature": 0.7, "entropy_gradient": True}
    ours, expected = (
        torch.autograd.grad(function(hidden_NH, weight_VH, targets_N, **options)[1].sum(), (hidden_NH, weight_VH))
        for function in (linear_logprobs, plain)
    )
    assert_close(ours, expected, 1e-12)


@pytest.mark.parametrize("sizes", [(1 << 20, 1 << 15), (700, 100), (512, 32)], ids=["whole", "some", "many"])
def test_float32_is_as_close_to_float64_as_the_plain_computation_is(cut, sizes):
    cut(*sizes)
    case = inputs(60, 32, 400, dtype=torch.float32, spread=0.6)
    exact = [leaf.detach().double().requires_grad_() for leaf in case[:3]] + [case[3]]
    options = {"temperature": 0.9, "entropy_gradient": True}
    expected = run(plain, *exact, **options)
    for part, theirs, reference in zip(
        run(linear_logprobs, *case, **options), run(plain, *case, **options), expected, strict=True
    ):
        assert part.dtype == torch.float32
        error, plain_error = ((one.double() - reference).abs().max() for one in (part, theirs))
        assert error <= 3 * plain_error + 1e-6


def test_bfloat16_comes_close_to_float32_and_gives_float32_values_and_bfloat16_gradients(cut):
    cut(700, 100)
    case = inputs(60, 32, 400, dtype=torch.bfloat16, spread=0.6)
    wide = [leaf.detach().float().requires_grad_() for leaf in case[:3]] + [case[3]]
    options = {"temperature": 0.9, "entropy_gradient": True}
    got = run(linear_logprobs, *case, **options)
    assert [part.dtype for part in got] == [torch.float32] * 2 + [torch.bfloat16] * 3
    assert_close(got, run(plain, *wide, **options), 2e-2)


def test_a_bfloat16_weight_gradient_loses_nothing_to_the_number_of_chunks(cut):
    """Summed in bfloat16, halves would stop counting at 128."""
    hidden_NH = torch.ones(320, 1, dtype=torch.bfloat16)
    weight_VH = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets_N = torch.zeros(320, dtype=torch.int64)
    cut(2, 2)
    linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=1.0)[0].sum().backward()
    assert weight_VH.grad.tolist() == [[160.0], [-160.0]]


@pytest.mark.parametrize("sizes", [(1 << 20, 1 << 15), (9, 3)], ids=["whole", "many"])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_logits_of_ten_thousand_give_exact_finite_results(cut, sizes, scale):
    """Columns tie at the largest logit, stand one below it, or so far below that they have no probability at all."""
    cut(*sizes)
    weight_VH = torch.tensor([[scale], [scale], [scale - 1], [-scale], [0.0], [scale], [-scale]], requires_grad=True)
    hidden_NH = torch.ones(7, 1, requires_grad=True)
    case = hidden_NH, weight_VH, None, torch.arange(7)
    got = run(linear_logprobs, *case, entropy_gradient=True)
    assert all(part.isfinite().all() for part in got)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden_NH, weight_VH)]
    expected = run(plain, *exact, None, case[-1], entropy_gradient=True)
    for part, reference in zip([*got[:2], got[3]], [*expected[:2], expected[3]], strict=True):
        torch.testing.assert_close(part.double(), reference, rtol=1e-6, atol=1e-5)


def test_chunks_change_nothing_beyond_rounding(cut):
    case, results = inputs(50, 16, 300, dtype=torch.float32, spread=0.7), []
    for sizes in [(1 << 20, 1 << 15), (3000, 300), (640, 64), (50, 50)]:
        cut(*sizes)
        results.append(run(linear_logprobs, *case, temperature=1.3, entropy_gradient=True))
    for result in results[1:]:
        assert_close(result, results[0], 3e-6)


def test_chunks_cover_tokens_and_vocabulary_once_within_their_bounds(cut):
    for num_tokens, num_columns, elements in [(0, 5, 10), (9, 32, 64), (33, 151_936, 1 << 22), (5000, 65, 640)]:
        cut(elements, 1 << 15, 64)
        hidden_NH, weight_VH = torch.empty(num_tokens, 1), torch.empty(num_columns, 1)
        columns = list(logprobs._vocabulary_chunks(weight_VH))
        rows = list(logprobs._token_chunks(hidden_NH, weight_VH))
        assert [c for part in columns for c in range(num_columns)[part]] == list(range(num_columns))
        assert [r for part in rows for r in range(num_tokens)[part]] == list(range(num_tokens))
        for part in columns:
            assert part.stop - part.start <= 1 << 15
            assert part.start % 64 == 0
        for part in rows:
            assert (part.stop - part.start) * (columns[0].stop - columns[0].start) <= max(elements, 1 << 15)


def test_no_tokens_give_empty_results_and_zero_gradients():
    got = run(linear_logprobs, *inputs(num_tokens=0), entropy_gradient=True)
    assert [part.numel() for part in got[:3]] == [0, 0, 0]
    assert not got[3].any()
    assert not got[4].any()


def test_hidden_states_may_be_strided():
    hidden_NH, weight_VH, bias_V, targets_N = inputs()
    strided_NH = torch.stack([hidden_NH, hidden_NH], -1).detach()[:, :, 1].requires_grad_()
    assert not strided_NH.is_contiguous()
    expected = run(plain, hidden_NH, weight_VH, bias_V, targets_N)
    assert_close(run(linear_logprobs, strided_NH, weight_VH, bias_V, targets_N), expected, 1e-12)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_asked_for_are_computed(asked):
    *leaves, targets_N = inputs()
    expected = run(plain, *leaves, targets_N)
    frozen = [leaf.detach().requires_grad_(index in asked) for index, leaf in enumerate(leaves)]
    with Allocations() as allocated:
        got = run(linear_logprobs, *frozen, targets_N)
    assert_close(got, [*expected[:2], *(expected[2 + index] for index in asked)], 1e-12)
    products = {index: leaf.shape for index, leaf in enumerate(leaves[:2])}
    for index in products.keys() - set(asked):
        assert products[index] not in allocated.shapes


def test_without_gradients_the_values_are_the_same():
    hidden_NH, weight_VH, bias_V, targets_N = inputs()
    with torch.no_grad():
        got = linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=0.7, bias_V=bias_V)
    expected = plain(hidden_NH, weight_VH, targets_N, temperature=0.7, bias_V=bias_V)
    assert not got[0].requires_grad
    assert_close(got, [part.detach() for part in expected], 1e-12)


@pytest.mark.parametrize("target", [-1, 11])
def test_a_target_outside_the_vocabulary_is_refused(target):
    hidden_NH, weight_VH, bias_V, targets_N = inputs()
    targets_N[3] = target
    with pytest.raises(IndexError):
        linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=1.0, bias_V=bias_V)


def allocations(function, num_columns, num_tokens=48, size=2):
    case = inputs(num_tokens, size, num_columns, dtype=torch.float32)
    with Allocations() as allocated:
        run(function, *case, entropy_gradient=True)
    return allocated


def test_the_largest_tensor_does_not_grow_with_the_vocabulary(cut):
    """But for those with a number for each weight; on the plain path the same count finds the logits."""
    cut(24576, 1024, 64)
    largest = {}
    for num_columns in (1024, 4096, 16384):
        sizes = allocations(linear_logprobs, num_columns).sizes
        assert max(sizes) < 48 * num_columns
        largest[num_columns] = max(size for size in sizes if size not in (num_columns, 2 * num_columns))
        assert 48 * num_columns in allocations(plain, num_columns).sizes
    assert set(largest.values()) == {24576}


def test_nothing_but_the_inputs_and_three_numbers_a_token_waits_for_backward():
    saved = []
    hidden_NH, weight_VH, bias_V, targets_N = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=1.0, bias_V=bias_V)
    extra = [tensor for tensor in saved if not any(tensor is one for one in (hidden_NH, weight_VH, bias_V, targets_N))]
    assert [tensor.shape for tensor in extra] == [targets_N.shape] * 3


@needs_compiler
@pytest.mark.soak
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_compiled_chunks_give_the_same_results(cut, monkeypatch, entropy_gradient):
    cut(700, 100)
    case = inputs(60, 32, 400, dtype=torch.float32, spread=0.6)
    expected = run(linear_logprobs, *case, temperature=0.9, entropy_gradient=entropy_gradient)
    for name in ("chunk_statistics", "chunk_gradient"):  # brings the plain ones back afterwards
        monkeypatch.setattr(logprobs, name, getattr(logprobs, name))
    logprobs.compile_chunks()
    assert logprobs.chunk_gradient is not logprobs._chunk_gradient
    compiled = logprobs.chunk_gradient
    logprobs.compile_chunks()
    assert logprobs.chunk_gradient is compiled
    assert_close(run(linear_logprobs, *case, temperature=0.9, entropy_gradient=entropy_gradient), expected, 3e-6)
