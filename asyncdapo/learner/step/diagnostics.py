"""What is measured at every token of an update, kept as sums: how far the policy is from the one that sampled it.

In: tensors of a micro-batch. Out: `Sums` that add over micro-batches, updates and ranks, and the `learner/…` metrics
that they come to: for all tokens, and for those of each staleness bucket apart. Quantiles of the ratio come from a
histogram of log ratios, whose bins are 2 % of |log ratio| wide and 0.0002 around 0.

    r = π_θ / μ    of each token, whatever the anchor of the loss; |log r| is clamped to 20 as in the loss
    ESS            (Σ r)² / (n Σ r²), from 1 (on policy) down to 1 / n
    χ²             mean r² − 1; of sequences with the product of r over a response
    k3             mean r − 1 − log r: estimates KL(μ ‖ π_θ) in nats (Schulman, 2020)
    second moment  mean (log r)²

Does not own: the gradient (`gradient`), what is alarming (`metrics/alarms`).

Shapes: n tokens under the mask, B completions, S staleness buckets, C columns, H bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asyncdapo.accounting.names import STALENESS_BUCKETS
from asyncdapo.algorithm.corrections import chi2, effective_sample_size
from asyncdapo.algorithm.dapo import MAX_LOG_RATIO
from asyncdapo.algorithm.variants import PolicyLoss, response_ratio
from asyncdapo.learner.model.packing import MicroBatch

NUM_BUCKETS = len(STALENESS_BUCKETS)
BUCKET_ENDS = (0, 1, 2, 4, 8)
"""Largest staleness of each bucket but the last."""

TOKEN_COLUMNS = (
    "tokens",
    "ratio",
    "ratio_squared",
    "k3",
    "log_ratio_squared",
    "entropy",
    "clip_low",
    "clip_high",
    "clip_dual",
    "untrusted",
    "gate",
    "correction",
    "kl",
)
ROW_COLUMNS = ("responses", "response_ratio_squared")
COLUMNS = (*TOKEN_COLUMNS, *ROW_COLUMNS)

QUANTILES = {"ratio_p01": 0.01, "ratio_p50": 0.5, "ratio_p99": 0.99}

NUM_BINS = 801
SCALE = 0.01
"""|log ratio| where bins go from equally wide to growing with it."""
REACH = math.asinh(MAX_LOG_RATIO / SCALE)


@dataclass(frozen=True)
class Sums:
    """Sums over some tokens. `packed` is all of it in one float64 tensor, as it travels between ranks."""

    packed: Tensor

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu") -> Sums:
        return cls(torch.zeros(NUM_BUCKETS * (len(COLUMNS) + NUM_BINS), dtype=torch.float64, device=device))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.packed + other.packed)

    def cpu(self) -> Sums:
        """Where numbers are read off it."""
        return Sums(self.packed.cpu())

    @property
    def num_tokens(self) -> int:
        return int(self._table[:, 0].sum())

    def metrics(self) -> dict[str, float]:
        """`learner/…` of all tokens, and `learner/staleness_…/…` of each bucket that has some."""
        whole = _summarise(self._table.sum(0), self._histogram.sum(0))
        metrics = {f"learner/{name}": number for name, number in whole.items()}
        for bucket, sums_C, histogram_H in zip(STALENESS_BUCKETS, self._table, self._histogram, strict=True):
            if sums_C[0]:
                part = _summarise(sums_C, histogram_H)
                metrics |= {f"learner/staleness_{bucket}/{name}": number for name, number in part.items()}
        return metrics

    @property
    def _table(self) -> np.ndarray:
        return self.packed[: NUM_BUCKETS * len(COLUMNS)].reshape(NUM_BUCKETS, len(COLUMNS)).numpy()

    @property
    def _histogram(self) -> np.ndarray:
        return self.packed[NUM_BUCKETS * len(COLUMNS) :].reshape(NUM_BUCKETS, NUM_BINS).numpy()


@torch.no_grad()
def measure(
    micro_batch: MicroBatch,
    policy: PolicyLoss,
    logp_BT: Tensor,
    entropy_BT: Tensor,
    correction_BT: Tensor,
    kl_BT: Tensor,
) -> Sums:
    """Sums over the tokens of a micro-batch. `correction_BT` and `kl_BT` may be of any shape that broadcasts."""
    log_ratio_n = micro_batch.flat(logp_BT - micro_batch.rollout_logprobs_BT).double()
    log_ratio_n = log_ratio_n.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_n = log_ratio_n.exp()
    none_BT = entropy_BT.new_zeros(())
    others = (
        entropy_BT,
        policy.clipped_low_BT,
        policy.clipped_high_BT,
        policy.clipped_dual_BT,
        none_BT if policy.untrusted_BT is None else policy.untrusted_BT,
        none_BT if policy.gate_BT is None else policy.gate_BT,
        correction_BT,
        kl_BT,
    )
    of_ratio = (torch.ones_like(ratio_n), ratio_n, ratio_n**2, ratio_n - 1 - log_ratio_n, log_ratio_n**2)
    columns = (*of_ratio, *map(micro_batch.flat, others))
    tokens_nC = torch.stack([column_n.double() for column_n in columns], dim=-1)
    mask_BT = micro_batch.loss_mask_BT
    response_ratio_B = response_ratio(logp_BT, micro_batch.rollout_logprobs_BT, mask_BT, geometric=False)[:, 0].double()
    rows_BC = torch.stack([torch.ones_like(response_ratio_B), response_ratio_B**2], dim=-1)

    # No `bucketize`: its bounds would be a copy to the GPU, for which the host waits until the backward pass is done.
    bucket_B = torch.stack([micro_batch.staleness_B > end for end in BUCKET_ENDS]).sum(0)
    bucket_n = micro_batch.flat(bucket_B[:, None])
    table_SC = rows_BC.new_zeros(NUM_BUCKETS, len(COLUMNS))
    table_SC[:, : len(TOKEN_COLUMNS)].index_add_(0, bucket_n, tokens_nC)
    table_SC[:, len(TOKEN_COLUMNS) :].index_add_(0, bucket_B, rows_BC)
    bin_n = bucket_n * NUM_BINS + _bins(log_ratio_n)
    histogram = rows_BC.new_zeros(NUM_BUCKETS * NUM_BINS).index_add_(0, bin_n, torch.ones_like(ratio_n))
    return Sums(torch.cat([table_SC.flatten(), histogram]))


def _bins(log_ratio_n: Tensor) -> Tensor:
    """Index of the bin of each log ratio; one that is not a number goes to the middle."""
    stretched_n = (log_ratio_n / SCALE).asinh().nan_to_num(0.0) / REACH
    return ((stretched_n + 1) / 2 * (NUM_BINS - 1)).round().long()


def _summarise(sums_C: np.ndarray, histogram_H: np.ndarray) -> dict[str, float]:
    """Of no token at all there is nothing but their number: NaN."""
    sums: dict[str, float] = dict(zip(COLUMNS, sums_C.tolist(), strict=True))
    num = sums["tokens"] or math.nan

    def mean(column: str) -> float:
        return sums[column] / num

    return {
        "tokens": sums["tokens"],
        "ratio_mean": mean("ratio"),
        "ess": effective_sample_size(sums["ratio"], sums["ratio_squared"], num),
        "chi2": chi2(sums["ratio_squared"], num),
        "chi2_sequence": chi2(sums["response_ratio_squared"], sums["responses"] or math.nan),
        "k3": mean("k3"),
        "second_moment": mean("log_ratio_squared"),
        "entropy": mean("entropy"),
        "clip_low_ratio": mean("clip_low"),
        "clip_high_ratio": mean("clip_high"),
        "clip_dual_ratio": mean("clip_dual"),
        "untrusted_ratio": mean("untrusted"),
        "gate_mean": mean("gate"),
        "correction_mean": mean("correction"),
        "kl": mean("kl"),
        **{name: _quantile(histogram_H, share) for name, share in QUANTILES.items()},
    }


def _quantile(histogram_H: np.ndarray, share: float) -> float:
    """The ratio below which this share of the tokens lies; the middle of its bin."""
    counts_H = histogram_H.cumsum()
    if not counts_H[-1]:
        return math.nan
    place = int(np.searchsorted(counts_H, share * counts_H[-1]))
    return math.exp(SCALE * math.sinh(REACH * (2 * place / (NUM_BINS - 1) - 1)))
