"""Sampling: narrows rows of logits, draws one token per row, and says how likely it was.

The uniform number behind a draw is a pure function of the sample's seed and the token's index in the response, and the
draw is the inverse of the cumulative distribution. So a sample doesn't depend on the others in its batch.

The log-prob is the float32 log-softmax of logits / T at the sampling temperature T, over the tokens that top-k and
top-p have left: those alone have a finite logit. Greedy tokens use T = 1.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

GAMMA = np.uint64(0x9E37_79B9_7F4A_7C15)


def uniforms(seeds: Sequence[int], count: int, first: int = 0) -> np.ndarray:
    """Uniform float64 numbers in [0, 1), [seeds, count]: one SplitMix64 stream per seed, from its number `first` on.

    (Steele, Lea, Flood 2014.) Number i depends on the seed, taken modulo 2^64, and on i alone.
    """
    starts = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF for seed in seeds], np.uint64)
    state = starts[:, None] + np.arange(first + 1, first + count + 1, dtype=np.uint64) * GAMMA
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58_476D_1CE4_E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D0_49BB_1331_11EB)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)) * 2.0**-53


def draw(
    logits_BV: torch.Tensor,
    temperatures_B: torch.Tensor,
    uniforms_B: torch.Tensor,
    *,
    greedy_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [B] and their log-probs float32 [B].

    `greedy_B` marks rows that take their most likely token. Only those are searched for it.
    """
    logprobs_BV = torch.log_softmax(logits_BV / temperatures_B.unsqueeze(1), dim=-1)
    cumulative_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
    targets_B1 = uniforms_B.unsqueeze(1) * cumulative_BV[:, -1:]
    # Beyond the last token only if logits are not finite; the log-prob then isn't either.
    tokens_B1 = torch.searchsorted(cumulative_BV, targets_B1, right=True).clamp_(max=logits_BV.shape[1] - 1)
    if greedy_B is not None:
        rows = greedy_B.nonzero().squeeze(1)
        tokens_B1[rows] = logits_BV[rows].argmax(-1, keepdim=True)
    return tokens_B1.squeeze(1), logprobs_BV.gather(1, tokens_B1).squeeze(1)


def narrow(
    logits_BV: torch.Tensor, temperatures_B: torch.Tensor, top_k_B: torch.Tensor, top_p_B: torch.Tensor
) -> torch.Tensor:
    """The logits, with -inf at the tokens outside top-k, and then outside top-p of what remains; 0 and 1 restrict
    nothing. Top-p leaves the most likely tokens until their share reaches `top_p`, at least one."""
    scores_BV, order_BV = (logits_BV / temperatures_B.unsqueeze(1)).sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
    in_top_k_BV = ranks_V < torch.where(top_k_B > 0, top_k_B, logits_BV.shape[-1]).unsqueeze(1)
    probs_BV = scores_BV.masked_fill(~in_top_k_BV, -torch.inf).softmax(-1)
    before_BV = probs_BV.cumsum(-1) - probs_BV
    is_left_BV = in_top_k_BV & ((before_BV < top_p_B.unsqueeze(1)) | (top_p_B.unsqueeze(1) >= 1))
    return logits_BV.masked_fill(~is_left_BV.scatter(1, order_BV, is_left_BV), -torch.inf)
