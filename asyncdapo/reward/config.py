"""Configuration of the reward: verdict, scale and shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from asyncdapo.errors import ConfigError
from asyncdapo.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

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
    overlong_buffer: NonNegativeInt = 0
    """Tokens before `rollout.max_response_length` over which the punishment of long responses rises (DAPO §3.4); 0 is
    no punishment."""
    overlong_penalty: NonNegativeFloat = 1.0
    """Punishment at `rollout.max_response_length`, subtracted from the reward."""
    overlong_filter: bool = False
    """Leave responses that were cut at the length limit out of the loss. They still count in their group's mean."""
    shuffle: bool = False
    """Control experiment: shuffle the scores within each group, so that there is nothing to learn."""

    processes: PositiveInt = 1
    """Verifier processes of each rollout worker. Each judges the completions of one group at a time."""
    concurrency: PositiveInt = 1
    """Completions of a group that a process judges at once. Only async functions get faster with it."""
    retries: Annotated[int, Meta(ge=0, le=MAX_RETRIES)] = 0
    """Retries after the verifier raised an error. The pauses are 0.5, 1, 2, … s."""
    timeout_s: PositiveFloat = 10.0
    """Seconds that a verifier may take for one completion: all tries together, without the pauses. After that the
    completion is judged again in a fresh process; the second time it counts as wrong."""
    max_failure_ratio: Annotated[float, Meta(ge=0, le=1, extra={"fix": "1 never ends the run"})] = 0.5
    """Share of groups on which the verifier may raise an error. Above it the run ends."""

    def __post_init__(self) -> None:
        if not self.correct > self.incorrect:
            raise ConfigError("reward.correct", f"must be above reward.incorrect ({self.incorrect})", self.correct)
        if self.overlong_penalty != 1.0 and not self.overlong_buffer:
            problem = "does nothing without reward.overlong_buffer"
            raise ConfigError("reward.overlong_penalty", problem, self.overlong_penalty)

    @property
    def longest_verdict_s(self) -> float:
        """Most seconds that one completion can take: two processes, each with all pauses."""
        return 2 * (self.timeout_s + sum(pauses_s(self.retries)))
