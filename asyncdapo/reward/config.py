"""Configuration of the reward: verdict and scale."""

from __future__ import annotations

from dataclasses import dataclass

from asyncdapo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How a completion's text becomes a number."""

    verifier: str = "answer"
    """Name of the verifier: `answer` (exact match of what follows the last `Answer: `)."""
    correct: float = 1.0
    """Reward of a right answer."""
    incorrect: float = -1.0
    """Reward of a wrong answer."""
    shuffle: bool = False
    """Control experiment: shuffle the verdicts within each group, so that there is nothing to learn."""

    def __post_init__(self) -> None:
        if not self.correct > self.incorrect:
            raise ConfigError("reward.correct", f"must be above reward.incorrect ({self.incorrect})", self.correct)
