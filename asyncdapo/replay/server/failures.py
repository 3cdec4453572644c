"""Failures of single leases that together are the run's: a verifier or a worker that hardly ever works.

In: how leases end, with the words of what failed. Out: the reason to end the run, if there is one, without which such a
run would use up its data; how many failed so far, and the last words.

    failed     the reward function raised. Of the last `WINDOW` leases that ended done or failed more than the allowed
               ratio failed; judged from `MIN_FAILED` failures on, so that a few bad rows at the start end nothing
    rejected   the group was broken. `MAX_REJECTED` in a row: a sound worker sends none, so any mix with good ones is
               the matter of its attempts alone

Memory: `WINDOW` booleans. Does not own: what becomes of the prompts (`lifecycle`).
"""

from __future__ import annotations

from collections import deque

WINDOW = 100
MIN_FAILED = 20
MAX_REJECTED = 100


class Failures:
    """Counts ends of leases; `count` says when it is too much."""

    def __init__(self, max_ratio: float) -> None:
        """`max_ratio`: share of failed leases up to which the run goes on; 1 never ends it."""
        self._max_ratio = max_ratio
        self._failed: deque[bool] = deque(maxlen=WINDOW)
        self._num_rejected = 0
        self.num_failed, self.last_words = 0, ""
        """Of this process's life: leases whose reward function raised, and what the last one said."""

    def count(self, outcome: str, detail: str) -> str | None:
        """A lease ended. Returns why the run can't go on; `detail` are the last words."""
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
