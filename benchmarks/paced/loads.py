"""Loads: engines and learners of known speed, and answers of known length.

In: the speeds. Out: `Load`; `LOADS`, where the engine is waited for, neither, or the learner, and one that is like a
real one; and `LONG_ANSWERS`, of which some take longer than a tight bound on staleness allows.
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
    slots: int = 16
    """Sequences that the engine runs at once."""
    group_size: int = 2
    tokens: float = 100.0
    """Median length of an answer."""
    spread: float = 0.8
    """Of the logarithm of a prompt's median length: long prompts are harder ones."""
    within: float = 0.3
    """Of the logarithm of the lengths within a group."""
    difficulty: float = 1.0
    """How fast the odds of a right answer fall with its prompt's median length; 0: all prompts are equally hard."""
    jitter: float = 0.18
    """Of the logarithm of the time of a train step. Real ones of the quickstart on idle cores had .13 to .21: .15 to .2
    from the number of tokens, .03 to .11 from the machine."""
    step_s: float = 0.01
    """Of one token of every running sequence, at few sequences."""
    step_s_per_sequence: float = 0.0008
    """What each running sequence adds to that."""

    def tokens_per_s(self, running: int) -> float:
        """Of one sequence."""
        return 1 / (self.step_s + self.step_s_per_sequence * running)

    def answers(self, draws: random.Random) -> tuple[list[int], tuple[float, ...]]:
        """Lengths and verdicts of the answers to a prompt."""
        longer = draws.lognormvariate(0, self.spread)
        solved = 1 / (1 + longer**self.difficulty)
        lengths = [self.tokens * longer * draws.lognormvariate(0, self.within) for _ in range(self.group_size)]
        verdicts = tuple(float(draws.random() < solved) for _ in lengths)
        return [max(1, math.ceil(length)) for length in lengths], verdicts


LOADS = {
    "engine-bound": Load(train_s=6.0),
    "balanced": Load(train_s=15.0),
    "learner-bound": Load(train_s=20.0),
    "crowded": Load(
        train_s=0.26,
        slots=64,
        group_size=5,
        tokens=33,
        spread=0.3,
        within=0.4,
        difficulty=3,
        step_s=0.001,
        step_s_per_sequence=0.00005,
    ),
}
"""`crowded` is nearly balanced, too, but most of a batch runs at once: what is short is waited for longest. Its speeds
and lengths are about those of the quickstart."""
LONG_ANSWERS = Load(train_s=6.0, spread=1.0, difficulty=0.5)
