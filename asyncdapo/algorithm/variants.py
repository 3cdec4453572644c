"""Alternatives to DAPO's parts: the ratio, the advantage, the average. Pure torch, no state, no I/O.

    ratio        ppo     r_t of each token (`dapo.py`)
                 gspo    s_i of the whole response: the geometric mean of its r_t (Zheng et al., 2025, arXiv 2507.18071)
                 cispo   a constant weight on log π_θ (MiniMax-M1, 2025, arXiv 2506.13585)
    advantage    grpo    centred and divided by the standard deviation (`dapo.py`)
                 dr_grpo centred (Liu et al., 2025, arXiv 2503.20783)
                 rloo    against the mean of the others (Ahmadian et al., 2024, arXiv 2402.14740)
    average      S_i = Σ_t loss_it over the n_i masked-in tokens of completion i, g its prompt, L the longest response
                 token-mean               Σ_i S_i / Σ_i n_i                    DAPO, eq. 8 (`dapo.py`)
                 token-sum                Σ_i S_i
                 seq-mean-token-sum       Σ_i S_i / #i
                 seq-mean-token-mean      Σ_i (S_i / n_i) / #i                 GRPO, eq. 3 (Shao et al., 2024)
                 seq-mean-token-sum-norm  Σ_i S_i / (#i · L)                   Dr. GRPO
                 prompt-mean              Σ_g (Σ_{i∈g} S_i / Σ_{i∈g} n_i) / #g ScaleRL (Khatri et al., 2025, 2510.13786)

L bounds the sampled tokens of a completion, and of an episode those of all turns together, so that n_i ≤ L. `#i` and
`#g` count only completions and prompts with a token; every denominator is at least 1, so that nothing is NaN.

    policy = policy_loss("ppo", logp_BT, old_logp_BT, advantages_BT, mask_BT, clip_low=0.2, clip_high=0.28)
    weights_N = aggregation_weights("token-mean", num_tokens_N, group_ids_N, copies_N, max_response_length=L)
    loss = (weights_N[rows_B, None] * policy.loss_BT).sum()      of a micro-batch that holds these rows of the update

Invariants: a position outside the mask may hold any finite value; it adds nothing to a loss, a gradient or a count.
Every average is one weight per completion, computed from counts of the whole update alone. So it is known before the
first backward pass, and the parts of an update add up to its loss for any split into ranks and micro-batches.

Shapes: G completions of one prompt, B completions of a forward pass, N completions of an optimizer update, P prompts of
it, T tokens. What is said of single tokens also takes flat tokens. Does not own: masks, corrections (`corrections.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from asyncdapo.algorithm.dapo import (
    MAX_LOG_RATIO,
    ClippedLoss,
    clipped_loss,
    group_advantage,
    importance_ratio,
    token_mean_weights,
)
from asyncdapo.plugins import cached_plugin, is_plugin

# The ratio, and the loss of each token.


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(ClippedLoss):
    """Loss of each token before averaging, which tokens each bound acts on, and the ratio they were judged by.

    For `cispo` the clipped tokens are those whose weight was clipped, whatever their advantage; they keep a gradient.
    """

    ratio_BT: Tensor
    """0 outside the mask."""


def policy_loss(
    variant: str,
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Loss of each token, [B, T]; 0 outside the mask. `dual_clip` has no meaning for `cispo` or a function of the
    user's, and is not looked at."""
    if is_plugin(variant):
        loss = cached_plugin("loss.variant", variant)
        returned = loss(logp_BT, old_logp_BT, advantages_BT, mask_BT, clip_low=clip_low, clip_high=clip_high)
        return returned if isinstance(returned, PolicyLoss) else _unclipped(returned, logp_BT, old_logp_BT, mask_BT)
    if variant == "cispo":
        return cispo_loss(logp_BT, old_logp_BT, advantages_BT, mask_BT, clip_low=clip_low, clip_high=clip_high)
    ratio_BT = RATIOS[variant](logp_BT, old_logp_BT, mask_BT)
    clipped = clipped_loss(
        ratio_BT, advantages_BT, mask_BT, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    return PolicyLoss(**vars(clipped), ratio_BT=ratio_BT)


def _unclipped(loss_BT: Tensor, logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor) -> PolicyLoss:
    """Of a function of the user's that doesn't say what it clips: each token's ratio is measured, no clipped token."""
    none_BT = torch.zeros_like(mask_BT)
    return PolicyLoss(
        ratio_BT=importance_ratio(logp_BT.detach(), old_logp_BT, mask_BT),
        loss_BT=torch.where(mask_BT, loss_BT, 0.0),
        clipped_low_BT=none_BT,
        clipped_high_BT=none_BT,
        clipped_dual_BT=none_BT,
    )


def response_ratio(logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor, *, geometric: bool) -> Tensor:
    """π_θ / π_old of each whole response, [B, 1]: the product of its tokens' ratios, or their geometric mean.

    1 for a response without a token. The gradient reaches every token of the response.
    """
    log_ratio_B1 = torch.where(mask_BT, logp_BT - old_logp_BT, 0.0).sum(-1, keepdim=True)
    if geometric:
        log_ratio_B1 = log_ratio_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    return log_ratio_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def gspo_ratio(logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """s_i of its response at each token, [B, T] (GSPO, eq. 7); 0 outside the mask."""
    return torch.where(mask_BT, response_ratio(logp_BT, old_logp_BT, mask_BT, geometric=True), 0.0)


def cispo_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, *, clip_low: float, clip_high: float
) -> PolicyLoss:
    """−clip(r_t, 1 − ε_low, 1 + ε_high) Â log π_θ with the clipped ratio as a constant (MiniMax-M1, eq. 4 and 5).

    A clipped token keeps its gradient, unlike under `clipped_loss`. ε_low = 1 leaves the ratio unbounded below.
    """
    ratio_BT = importance_ratio(logp_BT, old_logp_BT, mask_BT)
    constant_BT = ratio_BT.detach().clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    return PolicyLoss(
        ratio_BT=ratio_BT,
        loss_BT=-torch.where(mask_BT, constant_BT, 0.0) * logp_BT,
        clipped_low_BT=mask_BT & (ratio_BT < 1 - clip_low),
        clipped_high_BT=mask_BT & (ratio_BT > 1 + clip_high),
        clipped_dual_BT=torch.zeros_like(mask_BT),
    )


RATIOS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ppo": importance_ratio, "gspo": gspo_ratio}
"""What is clipped, by `loss.variant`: (logp_BT, old_logp_BT, mask_BT) -> ratio_BT."""


# The advantage.


def centred_advantage(rewards_G: Tensor) -> Tensor:
    """R − mean(R), [G] (Dr. GRPO). A group of one, or of equal rewards, teaches nothing: exactly 0."""
    if rewards_G.max() == rewards_G.min():
        return torch.zeros_like(rewards_G)
    return rewards_G - rewards_G.mean()


def leave_one_out_advantage(rewards_G: Tensor) -> Tensor:
    """R_i minus the mean of the other rewards, [G] (RLOO), which is `G / (G − 1)` times the centred reward."""
    num_others = max(1, len(rewards_G) - 1)
    return centred_advantage(rewards_G) * (len(rewards_G) / num_others)


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "grpo": group_advantage,
    "dr_grpo": centred_advantage,
    "rloo": leave_one_out_advantage,
}
"""By `loss.advantage`: rewards_G of one prompt's completions -> advantages_G."""


def advantage_of(name: str) -> Callable[[Tensor], Tensor]:
    """What `loss.advantage` names."""
    return cached_plugin("loss.advantage", name) if is_plugin(name) else ADVANTAGES[name]


# The average.


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
