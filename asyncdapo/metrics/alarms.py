"""Alarms: metrics of a step that a person should look at while the run continues.

In: the metrics line of each train step, in order. Out: sentences; each names the metric, its value, what it means, and
the keys to change. An alarm is reported when it begins, and again only after it has ended. A line without the metric,
or with NaN, neither begins nor ends an alarm. A ratio of groups is judged over as many steps as it takes to count
`MIN_GROUPS` groups: 0 of 4 says nothing. Does not own: where alarms are shown (`controller/loop`), what ends a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

BAD_UPDATES = "learner/bad_updates"
ENTROPY = "learner/entropy"
MIN_ENTROPY_SHARE = 0.1
"""Share of the first step's entropy. Below it a policy has nearly stopped exploring."""
ALL_CORRECT = "filter/all_correct_ratio"
MANY_CORRECT = 0.5
"""Share of the groups that are all correct. From here on low entropy is what a nearly solved task has."""
MIN_GROUPS = 100
ARRIVED = "rollout/arrived_groups"


@dataclass(frozen=True)
class Limit:
    """A metric that should stay on one side of a number."""

    metric: str
    alarms: Literal["above", "below"]
    number: float
    meaning: str
    turn: str
    groups: str = ""
    """Metric with the number of groups that it is taken over, if both are of this step."""
    groups_so_far: str = ""
    """The same, if both are of the run so far."""

    def broken(self, value: float) -> bool:
        return value > self.number if self.alarms == "above" else value < self.number

    def sentence(self, value: float) -> str:
        said = f"{self.metric} is {value:.3g}, {self.alarms} {self.number:.3g}"
        return _sentence(self.metric, said, self.meaning, self.turn)


LIMITS = (
    Limit(
        "replay/dropped_ratio",
        "above",
        0.02,
        "this share of the groups was dropped as stale, long answers first",
        "lower replay.run_ahead, raise replay.max_staleness, or set replay.on_stale=auto",
        groups_so_far="filter/prompts_consumed",
    ),
    Limit(
        "reward/failed_ratio",
        "above",
        0.02,
        "on this share of the groups the reward function raised, so that they can't be trained on",
        "fix reward.verifier (the ledger's events of kind failed have its errors), or raise reward.retries for a judge "
        "that is busy now and then",
        groups=ARRIVED,
    ),
    Limit(
        "filter/kept_ratio",
        "below",
        0.1,
        "nearly all groups are too easy or too hard to learn from (filter/all_correct_ratio and filter/all_wrong_ratio "
        "say which), so that nearly all tokens are sampled in vain",
        "take other prompts (prompts.path), raise rollout.group_size, or compare another filter.metric",
        groups=ARRIVED,
    ),
    Limit(
        "rollout/truncated_ratio",
        "above",
        0.5,
        "most answers are cut off before their end",
        "raise rollout.max_response_length, or set reward.overlong_buffer",
        groups=ARRIVED,
    ),
    Limit(
        "learner/ess",
        "below",
        0.5,
        "few tokens carry the updates, since the policy is far from the one that sampled them",
        "lower replay.run_ahead, learner.lr, learner.updates_per_step or learner.epochs, or set loss.outlier_band",
    ),
    Limit(
        "learner/masked_ratio",
        "above",
        0.5,
        "most tokens are masked for their distance from the policy that sampled them, so that little is learned",
        "widen loss.outlier_band or loss.correction_band, or lower replay.run_ahead or learner.lr",
    ),
    Limit(
        "learner/k3",
        "above",
        0.1,
        "the policy is this many nats from the one that sampled the tokens, or engine and learner disagree about it",
        "lower replay.run_ahead, learner.lr, learner.updates_per_step or learner.epochs, or set rollout.dtype=float32",
    ),
)


class Alarms:
    """Checks one line after the other."""

    def __init__(self, first: Mapping[str, float], last: Mapping[str, float]) -> None:
        """Lines of the first and of the last train step of a resumed run; empty for a new run."""
        self.active: dict[str, str] = {}
        """Sentences of the alarms that have begun and not ended, by metric."""
        self._gathered: dict[str, tuple[float, float]] = {}
        """For ratios over too few groups so far: number of groups, and how many of them count."""
        self._first_entropy = _finite(first, ENTROPY)
        self._num_bad = _finite(last, BAD_UPDATES) or 0.0

    def check(self, line: Mapping[str, float]) -> list[str]:
        """The alarms that begin with this line."""
        begun = []
        for metric, sentence in self._judged(line):
            if sentence is None:
                self.active.pop(metric, None)
            elif metric not in self.active:
                begun.append(sentence)
                self.active[metric] = sentence
        return begun

    def _judged(self, line: Mapping[str, float]) -> Iterator[tuple[str, str | None]]:
        """Each metric that this line can judge, with its alarm's sentence; None if there is no alarm."""
        for limit in LIMITS:
            value = self._gather(limit, line)
            if value is not None:
                yield limit.metric, limit.sentence(value) if limit.broken(value) else None
        entropy = _finite(line, ENTROPY)
        if entropy is not None:
            yield ENTROPY, self._judge_entropy(entropy, line.get(ALL_CORRECT, 0.0))
        num_bad = _finite(line, BAD_UPDATES)
        if num_bad is not None:
            yield BAD_UPDATES, self._judge_bad_updates(num_bad)

    def _gather(self, limit: Limit, line: Mapping[str, float]) -> float | None:
        """The number to judge; None while it is over too few groups."""
        value = _finite(line, limit.metric)
        if limit.groups_so_far:
            return value if line.get(limit.groups_so_far, 0) >= MIN_GROUPS else None
        if not limit.groups or value is None:
            return value
        num, counting = self._gathered.pop(limit.metric, (0.0, 0.0))
        num, counting = num + line.get(limit.groups, 0), counting + value * line.get(limit.groups, 0)
        if num >= MIN_GROUPS:
            return counting / num
        self._gathered[limit.metric] = num, counting
        return None

    def _judge_entropy(self, entropy: float, all_correct: float) -> str | None:
        if self._first_entropy is None:
            self._first_entropy = entropy
        if entropy >= MIN_ENTROPY_SHARE * self._first_entropy or all_correct >= MANY_CORRECT:
            return None
        return _sentence(
            ENTROPY,
            f"{ENTROPY} is {entropy:.3g}, below a tenth of the first step's {self._first_entropy:.3g}",
            "the policy has nearly stopped exploring",
            "raise loss.clip_high or loss.entropy_coef, or lower learner.lr",
        )

    def _judge_bad_updates(self, num_bad: float) -> str | None:
        """On in each step that skips an update. A rollback may lower the count."""
        before, self._num_bad = self._num_bad, num_bad
        if num_bad <= before:
            return None
        return _sentence(
            BAD_UPDATES,
            f"{BAD_UPDATES} rose from {before:.0f} to {num_bad:.0f}",
            "a loss or gradient was NaN or infinite, its update was skipped, and learner.max_bad_updates ends the run",
            "lower learner.lr, learner.grad_clip or replay.run_ahead",
        )


def _sentence(metric: str, said: str, meaning: str, turn: str) -> str:
    return f"{metric.partition('/')[0]} warning: {said}: {meaning}; {turn}"


def _finite(line: Mapping[str, float], metric: str) -> float | None:
    value = line.get(metric, math.nan)
    return value if math.isfinite(value) else None
