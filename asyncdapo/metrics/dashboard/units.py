"""The unit of a metric, by its name.

In: a name as docs/metrics.md has it. Out: the unit that stands there. Pure. Invariant: every name of that page gets the
page's unit (a test compares them).
"""

from __future__ import annotations

NAMES = {
    "ratio": "accuracy accuracy_stderr ess greedy_accuracy keep_rate mfu worker_kv_use_max worker_kv_use_mean",
    "nats": "entropy k3 kl parity_max parity_mean parity_p99",
    "reward": "mean filtered_mean",
    "train steps": "staleness_max staleness_mean",
    "version": "version version_max version_min",
    "1/s": "tokens_per_s worker_tokens_per_s_mean worker_tokens_per_s_min",
    "10^12/s": "tflops",
    "GiB": "peak_gib rank_peak_gib_max",
    "bytes": "bytes",
    "": "chi2 chi2_sequence correction_mean gate_mean grad_norm loss loss_scale lr ratio_mean ratio_p01 ratio_p50 "
    "ratio_p99 second_moment slowest_rank slowest_worker",
}
"""By unit, the names behind the last / that don't end with it."""
UNITS = {name: unit for unit, names in NAMES.items() for name in names.split()}
OWN_NUMBERS = "reward/metrics/"
"""Numbers of the user's. Only they know the unit."""


def unit_of(metric: str) -> str:
    """`s`, `ratio`, `count`, …; empty for a pure number."""
    name = metric.rpartition("/")[2]
    if metric.startswith(OWN_NUMBERS):
        return ""
    if name in UNITS:
        return UNITS[name]
    if name.endswith("_ratio") or "@" in name:
        return "ratio"
    return "s" if name.endswith("_s") else "count"
