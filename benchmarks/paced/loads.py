"""Loads: engines and learners of known speed, and answers of known length.

In: the speeds. Out: `Load`, and `LOADS`, the three that docs/log.md compares: the engine is waited for, neither, or the
learner.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a run has to do, and how fast it can."""

    train_s: float
    """Of a train step, its publish included."""
    slots: int = 64
    """Sequences that the engine runs at once."""
    group_size: int = 8
    tokens: float = 100.0
    """Median length of an answer."""
    spread: float = 0.8
    """Of the logarithm of a prompt's median length: long prompts are harder ones."""
    within: float = 0.3
    """Of the logarithm of the lengths within a group."""
    kept: float = 0.5
    """Share of the groups that the filter keeps."""
    jitter: float = 0.1
    """Of the logarithm of the time of a train step."""
    step_s: float = 0.01
    """Of one token of every running sequence, at few sequences."""
    step_s_per_sequence: float = 0.0002
    """What each running sequence adds to that."""

    def tokens_per_s(self, running: int) -> float:
        """Of one sequence."""
        return 1 / (self.step_s + self.step_s_per_sequence * running)

    def lengths(self, draws: random.Random) -> list[int]:
        """Of the answers to a prompt."""
        median = self.tokens * draws.lognormvariate(0, self.spread)
        return [max(1, math.ceil(median * draws.lognormvariate(0, self.within))) for _ in range(self.group_size)]


LOADS = {
    "engine-bound": Load(train_s=6.0),
    "balanced": Load(train_s=12.0),
    "learner-bound": Load(train_s=20.0),
}
