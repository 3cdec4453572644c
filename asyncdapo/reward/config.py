"""Configuration of the reward: verdict and scale."""

from __future__ import annotations

from dataclasses import dataclass

from asyncdapo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How a completion's text becomes a number."""

    verifier: str = "answer"
    """`answer` (exact match of what follows the last `Answer: `), or a function of yours that is given the response's
    text and the expected answer and returns 0 to 1: `package.module:function`, `path/to/file.py:function`."""
    correct: float = 1.0
    """Reward of a right answer."""
    incorrect: float = -1.0
    """Reward of a wrong answer."""
    overlong_buffer: int = 0
    """Tokens before `rollout.max_response_length` over which the punishment of long responses rises (DAPO §3.4); 0 is
    no punishment."""
    overlong_penalty: float = 1.0
    """What is taken off the reward at `rollout.max_response_length`."""
    overlong_filter: bool = False
    """Leave responses that were cut off at the length limit out of the loss; they still count in their group's mean."""
    shuffle: bool = False
    """Control experiment: shuffle the verdicts within each group, so that there is nothing to learn."""

    processes: int = 1
    """Verifier processes of each rollout worker; each judges the completions of one group at a time."""
    timeout_s: float = 10.0
    """Seconds a verifier may take over one completion; at the second try in a fresh process it counts as wrong."""
    max_failure_ratio: float = 0.5
    """Share of groups on which the verifier raised; above it the run ends."""

    def __post_init__(self) -> None:
        if not self.correct > self.incorrect:
            raise ConfigError("reward.correct", f"must be above reward.incorrect ({self.incorrect})", self.correct)
        for key in ("overlong_buffer", "overlong_penalty"):
            if getattr(self, key) < 0:
                raise ConfigError(f"reward.{key}", "must be at least 0", getattr(self, key))
        if self.processes < 1:
            raise ConfigError("reward.processes", "must be at least 1", self.processes)
        if not self.timeout_s > 0:
            raise ConfigError("reward.timeout_s", "must be above 0", self.timeout_s)
        if not 0 <= self.max_failure_ratio <= 1:
            raise ConfigError(
                "reward.max_failure_ratio", "must be from 0 to 1", self.max_failure_ratio, "1 never ends the run"
            )
