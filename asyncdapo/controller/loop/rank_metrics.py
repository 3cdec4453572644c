"""What the ranks of the learner report of a train step, put together.

In: the metrics of each rank, rank 0 first. Out: rank 0's, and where there are several what only all of them show: who
was the slowest, and what they took together. Pure. Does not own: what a rank measures (`learner`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def of_ranks(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of the step."""
    first = dict(reports[0])
    if len(reports) == 1:
        return first
    gradients = [report["learner/time/gradient_s"] for report in reports]
    return first | {
        "learner/rank_gradient_mean_s": sum(gradients) / len(gradients),
        "learner/rank_gradient_max_s": max(gradients),
        "learner/slowest_rank": gradients.index(max(gradients)),
        "learner/rank_peak_gib_max": max(report["learner/peak_gib"] for report in reports),
        "learner/ranks_cpu_s": sum(report["learner/cpu_s"] for report in reports),
    }
