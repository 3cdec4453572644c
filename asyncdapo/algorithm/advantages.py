"""The advantage of a completion: what its reward is compared with, and divided by. Pure torch, no state, no I/O.

of one prompt's rewards R:

    grpo     (R − mean) / std                                       GRPO, DAPO eq. 9 (`dapo.py`)
    dr_grpo  R − mean                                               Dr. GRPO (Liu et al., 2025, arXiv 2503.20783)
    rloo     R − mean of the others                                 RLOO (Ahmadian et al., 2024, arXiv 2402.14740)
    maxrl    (R − mean) / mean                                      MaxRL (Tajwar et al., 2026, arXiv 2602.02710)

of the rewards of all prompts of a batch, `mean_b` and `std_b` over the completions of all of them:

    grpo_batch_std          (R − mean) / std_b(R)                   Lite PPO (arXiv 2508.08221)
    reinforce_pp            (R − mean_b(R)) / std_b(R)              REINFORCE++ (Hu, 2025, arXiv 2501.03262)
    reinforce_pp_baseline   (C − mean_b(C)) / std_b(C), C = R − mean    its variant with a baseline per prompt

    advantages = batch_advantages("reinforce_pp")([rewards_G, …], copies=[1, …])

Standard deviations divide by n − 1 and are at least 1e-6 above 0. Where all rewards that an advantage compares are
equal there is nothing to learn: exactly 0. A prompt that stands c times in a batch counts c times in its statistics.

Invariant: an advantage depends on the rewards of the whole batch alone, whichever of them a rank trains on. Does not
own: rewards, which completions bear loss.

Shapes: G completions of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from asyncdapo.algorithm.dapo import group_advantage
from asyncdapo.plugins import cached_plugin, is_plugin

OfGroup = Callable[[Tensor], Tensor]
"""rewards_G of one prompt's completions -> advantages_G."""
OfBatch = Callable[[Sequence[Tensor], Sequence[int]], list[Tensor]]
"""rewards_G of each prompt of a batch, and how often it stands in it -> advantages_G of each."""


def centred_advantage(rewards_G: Tensor) -> Tensor:
    """R − mean(R), [G] (Dr. GRPO). A group of one, or of equal rewards, teaches nothing: exactly 0."""
    if rewards_G.max() == rewards_G.min():
        return torch.zeros_like(rewards_G)
    return rewards_G - rewards_G.mean()


def leave_one_out_advantage(rewards_G: Tensor) -> Tensor:
    """R_i minus the mean of the other rewards, [G] (RLOO), which is `G / (G − 1)` times the centred reward."""
    num_others = max(1, len(rewards_G) - 1)
    return centred_advantage(rewards_G) * (len(rewards_G) / num_others)


def maximum_likelihood_advantage(rewards_G: Tensor) -> Tensor:
    """(R − mean(R)) / mean(R), [G], of rewards ≥ 0 (MaxRL): with 1 for right and 0 for wrong the mean is the pass rate,
    and hard prompts count as in a maximum of log pass rate. 0 where no completion has a reward."""
    return centred_advantage(rewards_G) / rewards_G.mean() if rewards_G.sum() > 0 else torch.zeros_like(rewards_G)


ADVANTAGES: dict[str, OfGroup] = {
    "grpo": group_advantage,
    "dr_grpo": centred_advantage,
    "rloo": leave_one_out_advantage,
    "maxrl": maximum_likelihood_advantage,
}
"""By `loss.advantage`: those of a prompt."""


def _batch_std(rewards: Sequence[Tensor], copies: Sequence[int]) -> list[Tensor]:
    _, std = _statistics(rewards, copies)
    return [centred_advantage(rewards_G) / std for rewards_G in rewards]


def _reinforce_pp(rewards: Sequence[Tensor], copies: Sequence[int]) -> list[Tensor]:
    mean, std = _statistics(rewards, copies)
    return [(rewards_G - mean) / std for rewards_G in rewards]


def _reinforce_pp_baseline(rewards: Sequence[Tensor], copies: Sequence[int]) -> list[Tensor]:
    return _reinforce_pp([centred_advantage(rewards_G) for rewards_G in rewards], copies)


BATCH_ADVANTAGES: dict[str, OfBatch] = {
    "grpo_batch_std": _batch_std,
    "reinforce_pp": _reinforce_pp,
    "reinforce_pp_baseline": _reinforce_pp_baseline,
}
"""By `loss.advantage`: those of a batch."""


def _statistics(rewards: Sequence[Tensor], copies: Sequence[int], eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation + `eps` over all completions; of equal rewards that very reward, exactly."""
    counted = [rewards_G for rewards_G, count in zip(rewards, copies, strict=True) for _ in range(count)]
    all_N = torch.cat(counted)
    if all_N.max() == all_N.min():
        return all_N[0], torch.ones_like(all_N[0])
    return all_N.mean(), all_N.std(correction=1) + eps


def batch_advantages(name: str) -> OfBatch:
    """What `loss.advantage` names, for all prompts of a batch."""
    if name in BATCH_ADVANTAGES:
        return BATCH_ADVANTAGES[name]
    of_group = cached_plugin("loss.advantage", name) if is_plugin(name) else ADVANTAGES[name]
    return lambda rewards, copies: [of_group(rewards_G) for rewards_G in rewards]
