"""Failures of single leases that together end the run: a verifier or a worker that hardly ever works.

In: how leases end, with the error's words. Out: the reason to end the run, if there is one (otherwise the run would use
up its data); how many leases failed so far, and the last error.

    failed     the reward function raised. The run ends if more than the allowed ratio of the last `WINDOW` leases that
               ended `done` or `failed` have failed. It needs `MIN_FAILED` failures, so that a few bad rows at the start
               don't end it
    rejected   the group was broken. `MAX_REJECTED` in a row end the run. Single ones only cost their prompt an attempt

Memory: `WINDOW` booleans. Does not own: what becomes of the prompts (`lifecycle`).
"""

from __future__ import annotations

from collections import deque

WINDOW = 100
MIN_FAILED = 20
MAX_REJECTED = 100


class Failures:
    """Counts how leases end; `count` says when the run has to end."""

    def __init__(self, max_ratio: float) -> None:
        """`max_ratio`: largest share of failed leases with which the run continues; 1 never ends it."""
        self._max_ratio = max_ratio
        self._failed: deque[bool] = deque(maxlen=WINDOW)
        self._num_rejected = 0
        self.num_failed, self.last_words = 0, ""
        """Leases on which the reward function raised since this process started, and the last error."""

    def count(self, outcome: str, detail: str) -> str | None:
        """A lease ended; `detail` is the error. Returns why the run has to end, if it has."""
        if outcome == "rejected":
            self._num_rejected += 1
            if self._num_rejected == MAX_REJECTED:
                return f"{MAX_REJECTED} groups in a row were rejected, the last: {detail}"
        elif outcome in ("done", "failed"):
            self._num_rejected = 0
            self._failed.append(outcome == "failed")
            if outcome == "failed":
                self.num_failed, self.last_words = self.num_failed + 1, detail
                return self._judge(detail)
        return None

    def _judge(self, detail: str) -> str | None:
        num_failed, num = sum(self._failed), len(self._failed)
        if num_failed < MIN_FAILED or num_failed <= self._max_ratio * num:
            return None
        return (
            f"reward.max_failure_ratio: the reward function raised on {num_failed} of the last {num} groups, allowed "
            f"are {self._max_ratio:.0%}; the last: {detail}"
        )
