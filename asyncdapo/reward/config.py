"""Configuration of the reward: verdict, scale and shape."""

from __future__ import annotations

from dataclasses import dataclass

from asyncdapo.errors import ConfigError

FIRST_PAUSE_S = 0.5
"""Pause before the first retry; it doubles each time."""
MAX_RETRIES = 6
"""Their pauses add up to half a minute."""


def pauses_s(retries: int) -> list[float]:
    """Seconds before each retry."""
    return [FIRST_PAUSE_S * 2**number for number in range(retries)]


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How a completion's text becomes a number."""

    verifier: str = "answer"
    """`answer` (what follows the last `Answer: `, exactly), `dapo` (the same, normalised), `exact`, `gsm8k` (`####`),
    `math_verify`, `reasoning_gym`; or your own function, async or not: `package.module:function` or
    `path/to/file.py:function`. It takes the response's text and the expected answer, and returns a number from 0 to 1,
    or a dict of numbers with `acc`."""
    correct: float = 1.0
    """Reward of a right answer."""
    incorrect: float = -1.0
    """Reward of a wrong answer."""
    overlong_buffer: int = 0
    """Tokens before `rollout.max_response_length` over which the punishment of long responses rises (DAPO §3.4); 0: no
    punishment."""
    overlong_penalty: float = 1.0
    """Amount subtracted from the reward at `rollout.max_response_length`."""
    overlong_filter: bool = False
    """Leave responses that the length limit cut off out of the loss. They still count in their group's mean."""
    shuffle: bool = False
    """Control experiment: shuffle the scores within each group, so that there is nothing to learn."""

    processes: int = 1
    """Verifier processes of each rollout worker; each judges the completions of one group at a time."""
    concurrency: int = 1
    """Completions of a group that a process judges at a time; only async functions run faster with it."""
    retries: int = 0
    """Retries after the verifier raised, 0.5, 1, 2, … s apart."""
    timeout_s: float = 10.0
    """Seconds that a verifier may take over one completion, all tries together, without the pauses between them. If it
    takes longer, the completion is judged again in a fresh process; the second time it counts as wrong."""
    max_failure_ratio: float = 0.5
    """Share of groups on which the verifier raised; above it the run ends."""

    def __post_init__(self) -> None:
        if not self.correct > self.incorrect:
            raise ConfigError("reward.correct", f"must be above reward.incorrect ({self.incorrect})", self.correct)
        for key in ("overlong_buffer", "overlong_penalty"):
            if getattr(self, key) < 0:
                raise ConfigError(f"reward.{key}", "must be at least 0", getattr(self, key))
        if self.overlong_penalty != 1.0 and not self.overlong_buffer:
            problem = "does nothing without reward.overlong_buffer"
            raise ConfigError("reward.overlong_penalty", problem, self.overlong_penalty)
        for key in ("processes", "concurrency"):
            if getattr(self, key) < 1:
                raise ConfigError(f"reward.{key}", "must be at least 1", getattr(self, key))
        if not 0 <= self.retries <= MAX_RETRIES:
            raise ConfigError("reward.retries", f"must be from 0 to {MAX_RETRIES}", self.retries)
        if not self.timeout_s > 0:
            raise ConfigError("reward.timeout_s", "must be above 0", self.timeout_s)
        if not 0 <= self.max_failure_ratio <= 1:
            raise ConfigError(
                "reward.max_failure_ratio", "must be from 0 to 1", self.max_failure_ratio, "1 never ends the run"
            )

    @property
    def longest_verdict_s(self) -> float:
        """Most seconds that one completion can take: two processes, each with all pauses."""
        return 2 * (self.timeout_s + sum(pauses_s(self.retries)))
