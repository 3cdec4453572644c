"""Log-probs in chunks against the plain computation: values, gradients, and what is never held in memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asyncdapo.learner.model import logprobs
from asyncdapo.learner.model.logprobs import DrawnFrom, linear_logprobs
from tests.learner.tiny import needs_compiler


def plain(hidden_NH, weight_VH, targets_N, *, temperature, bias_V=None, entropy_gradient=False):
    scores_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)
    logprobs_NV = (scores_NV / temperature).log_softmax(-1)
    kept_NV = logprobs_NV if entropy_gradient else logprobs_NV.detach()
    return logprobs_NV.gather(-1, targets_N[:, None])[:, 0], -(kept_NV.exp() * kept_NV).sum(-1)


def inputs(num_tokens=7, size=5, num_columns=11, *, bias=True, dtype=torch.float64, seed=0, spread=2.0):
    """Hidden states, weight and bias as leaves that ask for gradients, and targets."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, size), (num_columns, size), (num_columns,)][: 3 if bias else 2]
    leaves = [spread * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    return *leaves, *([] if bias else [None]), torch.randint(num_columns, (num_tokens,), generator=generator)


def run(function, hidden_NH, weight_VH, bias_V, targets_N, *, temperature=1.0, entropy_gradient=False, seed=0):
    """Log-probs, entropies, and the gradients of every leaf under random weights of both."""
    leaves = [leaf for leaf in (hidden_NH, weight_VH, bias_V) if leaf is not None and leaf.requires_grad]
    options = {"temperature": temperature, "bias_V": bias_V, "entropy_gradient": entropy_gradient}
    logp_N, entropy_N = function(hidden_NH, weight_VH, targets_N, **options)
    generator = torch.Generator().manual_seed(seed)
    upstream_2N = torch.randn((2, len(targets_N)), generator=generator, dtype=torch.float64).to(logp_N.dtype)
    total = (logp_N * upstream_2N[0]).sum() + (entropy_N * upstream_2N[1]).sum()
    return [logp_N.detach(), entropy_N.detach(), *torch.autograd.grad(total, leaves)]


def assert_close(got, expected, tolerance):
    """Relative to the largest number of each tensor."""
    for part, reference in zip(got, expected, strict=True):
        assert part.shape == reference.shape
        scale = float(reference.abs().max()) if reference.numel() else 1.0
        torch.testing.assert_close(part.double(), reference.double(), rtol=tolerance, atol=tolerance * max(scale, 1.0))


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


@given(
    num_tokens=st.integers(1, 9),
    num_columns=st.integers(1, 30),
    elements=st.integers(1, 90),
    columns=st.integers(1, 9),
    entropy_gradient=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_what_was_drawn_from_a_part_of_the_vocabulary_has_the_plain_values_and_gradients_over_that_part(
    num_tokens, num_columns, elements, columns, entropy_gradient, seed
):
    """Whichever chunks have none of it; some tokens are from the whole vocabulary."""
    hidden_NH, weight_VH, bias_V, targets_N = inputs(num_tokens, 3, num_columns, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    is_in_NV = torch.rand((num_tokens, num_columns), generator=generator) < 0.3
    is_in_NV[torch.arange(num_tokens), targets_N] = True
    is_whole_N = torch.rand(num_tokens, generator=generator) < 0.3
    drawn_E, token_ids_E = (is_in_NV & ~is_whole_N[:, None]).nonzero().T
    ends_N = (is_in_NV & ~is_whole_N[:, None]).sum(1).cumsum(0).tolist()
    options = {"temperature": 0.7, "entropy_gradient": entropy_gradient}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CHUNK_ELEMENTS", {"cpu": elements})
        patch.setattr(logprobs, "COLUMNS", columns)
        patch.setattr(logprobs, "ALIGNMENT", 1)
        given = DrawnFrom(ends_N, is_whole_N, drawn_E, token_ids_E)
        got = run(partial(linear_logprobs, drawn_from=given), hidden_NH, weight_VH, bias_V, targets_N, **options)

    def over_the_part(hidden_NH, weight_VH, targets_N, *, temperature, bias_V, entropy_gradient):
        scores_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V) / temperature
        logprobs_NV = scores_NV.masked_fill(~(is_in_NV | is_whole_N[:, None]), -torch.inf).log_softmax(-1)
        kept_NV = logprobs_NV if entropy_gradient else logprobs_NV.detach()
        terms_NV = kept_NV.exp() * kept_NV.masked_fill(kept_NV == -torch.inf, 0.0)
        return logprobs_NV.gather(-1, targets_N[:, None])[:, 0], -terms_NV.sum(-1)

    assert_close(got, run(over_the_part, hidden_NH, weight_VH, bias_V, targets_N, **options), 1e-12)


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
    """Summed in bfloat16, hundreds of small parts would stop counting at some point."""
    hidden_NH = torch.ones(512, 1, dtype=torch.bfloat16)
    weight_VH = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets_N = torch.zeros(512, dtype=torch.int64)
    cut(2, 2)
    linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=1.0)[0].sum().backward()
    assert weight_VH.grad.tolist() == [[256.0], [-256.0]]


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


class Allocations(TorchDispatchMode):
    """Storages made while it is on: their sizes in elements, and the shapes of the tensors they were made for."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.shapes = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.sizes.append(leaf.untyped_storage().nbytes() // leaf.element_size())
                self.shapes.append(leaf.shape)
        return out


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


def test_a_part_of_the_vocabulary_for_each_token_makes_no_tensor_larger_than_a_chunk(cut):
    """But for the one column more that takes what belongs to other chunks."""
    cut(24576, 1024, 64)
    hidden_NH, weight_VH, bias_V, targets_N = inputs(48, 2, 16384, dtype=torch.float32)
    token_ids_E = torch.stack([targets_N, (targets_N + 1) % 16384], -1).flatten()
    of_two = DrawnFrom(list(range(2, 98, 2)), torch.zeros(48, dtype=torch.bool), torch.arange(96) // 2, token_ids_E)
    with Allocations() as allocated:
        run(partial(linear_logprobs, drawn_from=of_two), hidden_NH, weight_VH, bias_V, targets_N)
    assert max(size for size in allocated.sizes if size not in (16384, 2 * 16384)) <= 24576 + 24


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
