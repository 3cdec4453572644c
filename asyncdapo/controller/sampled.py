"""What several samples of each problem say about a model: avg@k, pass@k, maj@k.

In: verdicts (0..1, usually 0 or 1) of the samples of each problem. Out: one number for each problem; the value of the
evaluation is their mean. A run samples each held-out problem once, which is avg@1; what takes several samples waits for
evaluations that have them. Does not own: sampling, verdicts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def avg_at_k(correct: Sequence[Sequence[float]], k: int) -> list[float]:
    """Mean verdict of the first k samples of each problem (avg@32 of DAPO, §4.1). With k = 1 it is accuracy."""
    return [math.fsum(_first(verdicts, k)) / k for verdicts in correct]


def pass_at_k(num_samples: Sequence[int], num_correct: Sequence[int], k: int) -> list[float]:
    """Chance that at least one of k samples of each problem is right: `1 − C(n − c, k) / C(n, k)`, the unbiased
    estimate from n samples with c right ones (Chen et al., 2021, arXiv 2107.03374, eq. 1).

    In whole numbers up to the one division, so exact to the last digit for any n. Raises ValueError for k > n.
    """
    chances = []
    for n, c in zip(num_samples, num_correct, strict=True):
        if not (1 <= k <= n and 0 <= c <= n):
            raise ValueError(f"pass@{k} of {n} samples with {c} right ones")
        choices = math.comb(n, k)
        chances.append((choices - math.comb(n - c, k)) / choices)
    return chances


def maj_at_k(predictions: Sequence[Sequence[Hashable]], correct: Sequence[Sequence[float]], k: int) -> list[float]:
    """Verdict of the most frequent prediction among the first k samples of each problem (self-consistency, Wang et al.,
    2022, arXiv 2203.11171): that of its first sample. Of equally frequent ones the first that was seen is taken."""
    verdicts = []
    for predicted, right in zip(predictions, correct, strict=True):
        votes = Counter(_first(predicted, k))
        winner = max(votes, key=votes.__getitem__)
        verdicts.append(float(right[predicted.index(winner)]))
    return verdicts


def _first(samples: Sequence, k: int) -> Sequence:
    """Raises ValueError when there are fewer than k, or k is not positive."""
    if not 1 <= k <= len(samples):
        raise ValueError(f"{k} of {len(samples)} samples")
    return samples[:k]
