"""The filter: a verdict on every group, the share of kept ones, and generation batches.

In: a complete group's metrics and its number of loss-bearing tokens. Out: its verdict; `keep_rate`, by which admission
scales the running groups; and generation batches, which limit how long one train step may look for groups worth
training on.

    kept       the metric varies within the group: it is trained on
    constant   max − min ≤ 1e-6 (zero variance): every advantage is 0, so there is nothing to learn (DAPO, §3.2)
    masked     no token bears loss

Does not own: where a group goes after its verdict (`queue.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from asyncdapo.errors import ConfigError
from asyncdapo.replay.config import FilterConfig

Verdict = Literal["kept", "constant", "masked"]

MIN_SPREAD = 1e-6
"""A metric is constant if max − min is at most this. Float noise of equal rewards is smaller."""
KEEP_RATE_BATCHES = 4
"""The keep rate is taken over the verdicts of this many batches."""
MIN_KEEP_RATE = 0.1
"""Even if nearly all groups are filtered, admission counts a tenth of the running ones, so that leases stay bounded."""


def judge(config: FilterConfig, metrics: Mapping[str, Sequence[float]], num_loss_tokens: int) -> Verdict:
    """Verdict on a group. With the filter off, every group is kept.

    `metrics`: each metric that every completion has, one number per completion. Raises ConfigError if the configured
    metric isn't one of them.
    """
    if not config.enabled:
        return "kept"
    if config.metric not in metrics:
        names = ", ".join(sorted(metrics)) or "none"
        raise ConfigError(
            "filter.metric", "a group's completions don't all have this metric", config.metric, f"they have: {names}"
        )
    if num_loss_tokens == 0:
        return "masked"
    values = metrics[config.metric]
    return "kept" if max(values) - min(values) > MIN_SPREAD else "constant"


class KeepRate:
    """Estimates from the latest verdicts which share of the running groups the filter will keep.

    `(4 + kept) / (4 + seen)` over the verdicts of the last 4 batches, at least 0.1. The prior of four kept groups
    damps the first few verdicts. With the filter off it is 1, since every verdict is `kept`.
    """

    def __init__(self, prompts_per_step: int, verdicts: Iterable[bool] = ()) -> None:
        """`verdicts` so far, oldest first: whether each group was kept."""
        self._latest = deque(verdicts, maxlen=KEEP_RATE_BATCHES * prompts_per_step)
        self._num_kept = sum(self._latest)

    def count(self, verdict: Verdict) -> None:
        if len(self._latest) == self._latest.maxlen:
            self._num_kept -= self._latest[0]
        self._latest.append(verdict == "kept")
        self._num_kept += self._latest[-1]

    @property
    def value(self) -> float:
        return max(MIN_KEEP_RATE, (4 + self._num_kept) / (4 + len(self._latest)))


class GenBatches:
    """Generation batches: verdicts grouped by `size`, in order of arrival.

    A generation batch opens with its first verdict. It belongs to the train step whose batch is being filled then, even
    if that batch is cut before it closes. `num_opened` counts those of the current step.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_opened = 0
        self._num_verdicts = 0
        self._step, self._number = 0, 0

    def count(self, step: int) -> None:
        """A verdict fell while the batch of `step` was being filled."""
        self.open(step)
        self._num_verdicts += 1

    def open(self, step: int) -> None:
        """Have one open; when none is, it belongs to `step`."""
        if not self.is_open:
            self.num_opened += 1
            self._step, self._number = step, self.num_opened

    @property
    def is_open(self) -> bool:
        return self._num_verdicts > 0

    @property
    def is_full(self) -> bool:
        return self._num_verdicts >= self.size

    def close(self) -> tuple[int, int]:
        """Close the open one. Returns the step that it belongs to and its number within that step, from 1."""
        self._num_verdicts = 0
        return self._step, self._number

    def next_step(self) -> None:
        """The batch was cut: from now on, new generation batches belong to the next step."""
        self.num_opened = 0

    def recount(self, step: int, closed: Mapping[int, int], open_verdicts: Sequence[int]) -> None:
        """Restore the counts of a former process. `step`: the one whose batch is being filled. `closed`: number of
        closed generation batches of each step. `open_verdicts`: the step of each verdict since, oldest first."""
        counted = None
        for verdict_step in open_verdicts:
            if verdict_step != counted:
                counted, self.num_opened = verdict_step, closed.get(verdict_step, 0)
            self.count(verdict_step)
            if self.is_full:
                self.close()
        if counted != step:
            self.num_opened = closed.get(step, 0)
