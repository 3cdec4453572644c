"""The average over an update's tokens, as one weight per completion. Pure torch, no state, no I/O.

S_i = Σ_t loss_it over the n_i masked-in tokens of completion i, g its prompt, L the longest response there can be:

    token-mean               Σ_i S_i / Σ_i n_i                    DAPO, eq. 8 (`dapo.py`)
    token-sum                Σ_i S_i
    seq-mean-token-sum       Σ_i S_i / #i
    seq-mean-token-mean      Σ_i (S_i / n_i) / #i                 GRPO, eq. 3 (Shao et al., 2024)
    seq-mean-token-sum-norm  Σ_i S_i / (#i · L)                   Dr. GRPO (Liu et al., 2025, arXiv 2503.20783)
    prompt-mean              Σ_g (Σ_{i∈g} S_i / Σ_{i∈g} n_i) / #g ScaleRL (Khatri et al., 2025, arXiv 2510.13786)

L bounds the sampled tokens of a completion, and of an episode those of all turns together, so that n_i ≤ L. `#i` and
`#g` count only completions and prompts with a token; every denominator is at least 1, so that nothing is NaN.

    weights_N = aggregation_weights("token-mean", num_tokens_N, group_ids_N, copies_N, max_response_length=L)
    loss = (weights_N[rows_B, None] * policy.loss_BT).sum()      of a micro-batch that holds these rows of the update

Invariant: every weight is computed from counts of the whole update alone. So it is known before the first backward
pass, and the parts of an update add up to its loss for any split into ranks and micro-batches.

Shapes: B completions of a forward pass, N completions of an optimizer update, P prompts of it, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from asyncdapo.algorithm.dapo import token_mean_weights
from asyncdapo.plugins import cached_plugin, is_plugin


@dataclass(frozen=True)
class UpdateCounts:
    """What an optimizer update holds, on all ranks and in all micro-batches, after all masks."""

    num_tokens_N: Tensor
    """Masked-in tokens of each completion."""
    group_ids_N: Tensor
    copies_N: Tensor
    """Times that the completion stands in the update: it is computed once and counts as often."""
    max_response_length: int
    """L: the longest response there can be, in tokens."""

    @property
    def num_sequences(self) -> int:
        """#i, at least 1."""
        return max(1, int((self.copies_N * (self.num_tokens_N > 0)).sum()))

    def by_prompt(self) -> tuple[int, Tensor]:
        """#g, at least 1, where a copy of a group counts as one more prompt; and the tokens of one copy of each
        completion's group, [N]. Raises ValueError when a group doesn't stand in the update as a whole."""
        found = self.group_ids_N.unique(return_inverse=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] (untyped in torch)
        prompts_P, prompt_N = cast(tuple[Tensor, Tensor], found)
        tokens_P = torch.zeros_like(prompts_P).index_add(0, prompt_N, self.num_tokens_N)
        copies_P = torch.zeros_like(prompts_P).index_put((prompt_N,), self.copies_N)
        if not torch.equal(copies_P[prompt_N], self.copies_N):
            raise ValueError("the completions of a group must stand in the update equally often")
        return max(1, int((copies_P * (tokens_P > 0)).sum())), tokens_P[prompt_N]


def aggregation_weights(
    agg: str, num_tokens_N: Tensor, group_ids_N: Tensor, copies_N: Tensor, *, max_response_length: int
) -> Tensor:
    """What each token of a completion counts in the loss of the update, float64 [N]: `loss = Σ_i weights_i Σ_t loss_it`
    over the completions as they are computed, each once.

    All three counts are int64 [N] and cover the whole update: every rank and micro-batch, after all masks. A completion
    that stands c times in the update (`copies_N`, ≥ 1) counts c times in every sum and every denominator.
    """
    counts = UpdateCounts(num_tokens_N, group_ids_N, copies_N, max_response_length)
    average = cached_plugin("loss.agg", agg) if is_plugin(agg) else AGGREGATIONS[agg]
    return copies_N * average(counts)


def _token_mean(counts: UpdateCounts) -> Tensor:
    return token_mean_weights(counts.copies_N * counts.num_tokens_N)


def _token_sum(counts: UpdateCounts) -> Tensor:
    return torch.ones_like(counts.num_tokens_N, dtype=torch.float64)


def _seq_mean_token_sum(counts: UpdateCounts) -> Tensor:
    return _token_sum(counts) / counts.num_sequences


def _seq_mean_token_mean(counts: UpdateCounts) -> Tensor:
    return _seq_mean_token_sum(counts) / counts.num_tokens_N.clamp(min=1)


def _seq_mean_token_sum_norm(counts: UpdateCounts) -> Tensor:
    return _seq_mean_token_sum(counts) / counts.max_response_length


def _prompt_mean(counts: UpdateCounts) -> Tensor:
    num_prompts, tokens_of_prompt_N = counts.by_prompt()
    return _token_sum(counts) / num_prompts / tokens_of_prompt_N.clamp(min=1)


AGGREGATIONS: dict[str, Callable[[UpdateCounts], Tensor]] = {
    "token-mean": _token_mean,
    "token-sum": _token_sum,
    "seq-mean-token-sum": _seq_mean_token_sum,
    "seq-mean-token-mean": _seq_mean_token_mean,
    "seq-mean-token-sum-norm": _seq_mean_token_sum_norm,
    "prompt-mean": _prompt_mean,
}
"""By `loss.agg`: weight of a token of one copy of each completion, float64 [N]."""
