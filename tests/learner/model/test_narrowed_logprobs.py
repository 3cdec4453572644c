"""Log-probs of tokens that were drawn from a part of the vocabulary, against the plain computation over that part."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.learner.model import logprobs
from asyncdapo.learner.model.logprobs import DrawnFrom, linear_logprobs
from tests.learner.model.logprob_cases import Allocations, assert_close, inputs, run


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


def test_a_part_of_the_vocabulary_for_each_token_makes_no_tensor_larger_than_a_chunk(monkeypatch):
    """But for the one column more that takes what belongs to other chunks."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", {"cpu": 24576})
    monkeypatch.setattr(logprobs, "COLUMNS", 1024)
    hidden_NH, weight_VH, bias_V, targets_N = inputs(48, 2, 16384, dtype=torch.float32)
    token_ids_E = torch.stack([targets_N, (targets_N + 1) % 16384], -1).flatten()
    of_two = DrawnFrom(list(range(2, 98, 2)), torch.zeros(48, dtype=torch.bool), torch.arange(96) // 2, token_ids_E)
    with Allocations() as allocated:
        run(partial(linear_logprobs, drawn_from=of_two), hidden_NH, weight_VH, bias_V, targets_N)
    assert max(size for size in allocated.sizes if size not in (16384, 2 * 16384)) <= 24576 + 24
