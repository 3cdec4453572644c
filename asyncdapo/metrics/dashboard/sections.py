"""The board of a run: what to look at, in which order, at W&B and in Grafana.

In: nothing. Out: `SECTIONS` of at most `MAX_PANELS` panels each. A panel's metrics have one unit, which its axis shows.
Pure. Invariants: every metric is on docs/metrics.md; every metric with an alarm, every cause of lost time and every
number of a progress line is in a panel (tests hold both). Does not own: what a panel looks like in a program
(`wandb_board`, launchers/grafana_board.py), what metrics mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asyncdapo.accounting.names import LEARNER_STATES, STALENESS_BUCKETS, WORKER_STATES
from asyncdapo.metrics.dashboard.units import unit_of
from asyncdapo.metrics.jsonl import UNDONE_BY
from asyncdapo.metrics.verdict.verdict import LIMITS
from asyncdapo.metrics.verdict.window import LOOP, SHOWN_FATES

SCHEMA = 2
"""Version of `SECTIONS`. A saved board of a lower version is replaced."""
MAX_PANELS = 8


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Several metrics over train steps. `shares`: stacked, each as its part of their sum."""

    title: str
    metrics: tuple[str, ...]
    look: Literal["lines", "stack", "shares"] = "lines"
    smoothing: float = 0.0
    """Weight of the steps before in an exponential moving average; the numbers themselves stay visible."""

    @property
    def unit(self) -> str:
        """Of its axis."""
        return "ratio" if self.look == "shares" else unit_of(self.metrics[0])


@dataclass(frozen=True)
class Section:
    """Panels of one subject."""

    title: str
    panels: tuple[Panel, ...]


def _panel(
    title: str, prefix: str, names: str, look: Literal["lines", "stack", "shares"] = "lines", smoothing: float = 0.0
) -> Panel:
    """`names`: separated by spaces, each behind `prefix`."""
    return Panel(title=title, metrics=tuple(prefix + name for name in names.split()), look=look, smoothing=smoothing)


def _by_staleness(title: str, name: str, look: Literal["lines", "shares"] = "lines") -> Panel:
    metrics = tuple(f"learner/staleness_{bucket}/{name}" for bucket in STALENESS_BUCKETS)
    return Panel(title=title, metrics=metrics, look=look)


def _states(title: str, prefix: str, states: str, look: Literal["stack", "shares"]) -> Panel:
    return _panel(title, prefix, " ".join(f"{state}_s" for state in states.split()), look)


NOISY = 0.6
"""Smoothing of what varies from batch to batch."""

SECTIONS = (
    Section(
        "Verdict",
        (
            _panel("Time that is lost, by cause", "verdict/", " ".join(f"{limit}_ratio" for limit in LIMITS), "stack"),
            _panel("Time in which the busiest stage works", "verdict/", "overlap_ratio"),
            _states("What a step's time goes into", "controller/", " ".join(LOOP), "stack"),
            _states("Time of workers so far", "rollout/time/", " ".join(WORKER_STATES), "shares"),
            _states("Time of the learner", "learner/time/", " ".join((*LEARNER_STATES, "other")), "stack"),
            _panel("Time of verifiers so far", "reward/time/", "busy_s idle_s", "shares"),
            _panel("Duration of a step", "time/", "step_s", smoothing=NOISY),
        ),
    ),
    Section(
        "Throughput",
        (
            Panel(
                title="Tokens per second, sampled and trained on",
                metrics=("rollout/tokens_per_s", "learner/tokens_per_s"),
                smoothing=NOISY,
            ),
            _panel("Tokens per second of a worker, mean and slowest", "rollout/worker_tokens_per_s_", "mean min"),
            _panel("Groups between workers and learner", "replay/", "queued running in_training credits"),
            _panel("What became of tokens so far", "replay/tokens_", " ".join(SHOWN_FATES), "shares"),
            _panel("Publishing weights", "weights/", "publish_s gather_s send_s receive_s pause_s load_s resume_s"),
            _panel("Use of the learner's GPU", "learner/", "mfu"),
            _panel("Operations of the learner", "learner/", "tflops"),
            _panel("Checkpoints", "learner/checkpoint_", "copy_s write_s"),
        ),
    ),
    Section(
        "Staleness",
        (
            _panel("Staleness of trained groups, mean and highest", "replay/staleness_", "mean max"),
            _by_staleness("Trained tokens by staleness", "tokens", "shares"),
            _panel("Groups dropped as stale", "replay/", "dropped_ratio"),
            _panel(
                "Length of answers, trained and dropped",
                "replay/",
                "trained_response_tokens_mean dropped_response_tokens_mean",
            ),
            _by_staleness("Effective sample size by staleness", "ess"),
            _by_staleness("Clipped above by staleness", "clip_high_ratio"),
            _by_staleness("Distance from the sampling policy by staleness", "k3"),
            _panel("Log-probs of engines against the learner's", "rollout/parity_", "mean p99 max"),
        ),
    ),
    Section(
        "Learning",
        (
            _panel("Reward, of all groups and of those trained on", "reward/", "mean filtered_mean", smoothing=NOISY),
            _panel("Held-out accuracy", "eval/", "accuracy greedy_accuracy"),
            _panel("Entropy of the policy", "learner/", "entropy", smoothing=NOISY),
            _panel("Gradient norm", "learner/", "grad_norm", smoothing=NOISY),
            _panel("Loss", "learner/", "loss", smoothing=NOISY),
            _panel("Learning rate", "learner/", "lr"),
            _panel("Length of answers", "rollout/response_tokens_", "p10 p50 p90 max"),
            _panel("Answers cut off at the longest length", "", "rollout/truncated_ratio eval/truncated_ratio"),
        ),
    ),
    Section(
        "DAPO",
        (
            _panel("Groups by verdict", "filter/", "kept_ratio all_correct_ratio all_wrong_ratio", smoothing=NOISY),
            _panel("Prompts with a verdict so far", "filter/", "prompts_consumed"),
            _panel("Clipped tokens", "learner/clip_", "low_ratio high_ratio dual_ratio"),
            _panel("Importance ratio", "learner/ratio_", "p01 p50 mean p99"),
            _panel("Effective sample size", "learner/", "ess"),
            _panel("Distance from the sampling policy", "learner/", "k3 kl"),
            _panel("χ² from the sampling policy", "learner/", "chi2 chi2_sequence"),
            _panel("Tokens masked or not computed", "learner/", "masked_ratio uncomputed_ratio"),
        ),
    ),
    Section(
        "Health",
        (
            _panel("Groups whose reward function raised", "reward/", "failed_ratio"),
            _panel("Updates skipped for NaN so far", "learner/", "bad_updates"),
            _panel(
                "Leases that ended without a group so far",
                "rollout/",
                "late_leases withdrawn_leases lost_leases rejected_leases failed_leases",
            ),
            _panel("Messages refused so far", "replay/", "strangers malformed rejected duplicates"),
            _panel("Live workers", "replay/", "workers"),
            _panel("Memory of the learner", "learner/", "peak_gib"),
            _panel(
                "Time of the replay server so far",
                "replay/time/",
                "workers_s learner_s commands_s clock_s idle_s",
                "shares",
            ),
            _panel("Steps that were undone, by branch", "", UNDONE_BY),
        ),
    ),
)
