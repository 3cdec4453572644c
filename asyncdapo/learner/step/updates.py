"""Updates: what each optimizer update of a train step came to, and the metrics of all of them.

In: the updates of a step, summed over ranks. Out: `learner/…` metrics, the same at every rank. Does not own: how an
update is made (`learner`), the sums of its tokens (`diagnostics`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from asyncdapo.learner.config import LossConfig
from asyncdapo.learner.step.diagnostics import Sums
from asyncdapo.learner.step.gradient import Part


@dataclass(frozen=True)
class Update:
    """What one optimizer update came to, over all ranks."""

    part: Part
    num_tokens: int
    """Loss-bearing tokens, those included that weren't computed since their advantage is 0."""
    lr: float
    grad_norm: float | None
    """Global norm before clipping; none for an update that was skipped."""


def update_metrics(updates: Sequence[Update], loss: LossConfig) -> dict[str, float]:
    """The step's `learner/…` metrics: over the tokens of all applied updates, and over those updates. What the loss
    doesn't have is left out."""
    applied = [update for update in updates if update.grad_norm is not None]
    grad_norms = [update.grad_norm for update in updates if update.grad_norm is not None]
    sums, num_tokens = Sums.zeros(), sum(update.num_tokens for update in applied)
    for update in applied:
        sums += update.part.sums
    metrics = sums.metrics() | {
        "learner/tokens": float(num_tokens),
        "learner/uncomputed_ratio": ratio(num_tokens - sums.num_tokens, num_tokens),
    }
    unused = {
        "untrusted_ratio": loss.variant not in ("m2po", "estr"),
        "gate_mean": loss.variant not in ("sapo", "vespo"),
        "correction_mean": loss.correction == "none",
        "kl": not loss.kl_coef,
        "uncomputed_ratio": loss.needs_all_completions,
    }
    return {
        **{name: value for name, value in metrics.items() if not unused.get(name.rpartition("/")[2])},
        "learner/loss": ratio(sum(update.part.loss for update in applied), len(applied)),
        "learner/grad_norm": ratio(sum(grad_norms), len(grad_norms)),
        "learner/lr": applied[-1].lr if applied else 0.0,
    }


def ratio(part: float, whole: float) -> float:
    """NaN of nothing."""
    return part / whole if whole else math.nan
