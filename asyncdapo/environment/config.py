"""Configuration of the environment: whose it is, its processes, and the limits of an episode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from asyncdapo.environment.in_host.loading import AGENT, OPENENV, VERIFIERS
from asyncdapo.errors import ConfigError
from asyncdapo.ranges import NonNegativeInt, PositiveFloat, PositiveInt

CONCURRENCY = 16
NUM_TRIES = 2
"""Times that an episode may be in a host when it dies or is killed because the episode took too long."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """What answers the model in an episode of several turns. Without `path`, a completion is a single response."""

    path: str | None = None
    """Your environment's class: `path/to/file.py:Class` or `package.module:Class`, with the methods `reset` and `step`
    ([environments](environments.md)), or one of TRL's or SkyRL's. Or `agent:path/to/file.py:run`, a function that calls
    the model by itself; `openenv:http://host:8000`, a server of OpenEnv; `verifiers:TASKSET`, a taskset of verifiers.
    null is none: completions are judged by `reward.verifier`."""
    processes: PositiveInt = 1
    """Host processes of each rollout worker, in which environments run."""
    concurrency: PositiveInt | None = None
    """Calls that a host works on at once. Plain methods run in so many threads. null is 16; for an `agent:`, whose call
    is a whole episode, as many as the worker has seats for."""
    max_turns: PositiveInt = 8
    """Most turns of an episode. The last response is still given to `step`."""
    max_context: PositiveInt | None = None
    """Most tokens of an episode, prompt and observations included. null is the sum of `prompts.max_prompt_length` and
    `rollout.max_response_length`. The latter bounds the sampled tokens of all turns together."""
    max_seconds: PositiveFloat = 600.0
    """Seconds that an episode may spend in its environment, all calls together."""
    step_timeout_s: PositiveFloat = 30.0
    """Seconds that one call of the environment may take. After that its host is killed, and the episode is sampled
    again in a host of its own; the second time it counts as wrong."""
    retries: NonNegativeInt = 1
    """Times that an episode is sampled again after its environment raised. After that its group fails."""
    oversubscribe: Annotated[float, Meta(ge=1)] = 1.0
    """Episodes under way as a multiple of `rollout.slots`. Above 1 the engine has work while environments are slow."""
    python: str | None = None
    """Interpreter of the hosts, such as that of another virtual environment. null is the run's own."""

    def __post_init__(self) -> None:
        path = self.path or ""
        if path.startswith(OPENENV) and not path.removeprefix(OPENENV).startswith(("http://", "https://")):
            raise ConfigError("environment.path", "names no server", path, "openenv:http://host:8000")
        if self.path is not None and ":" not in self.path.removeprefix(AGENT):
            fix = "path/to/file.py:Class or package.module:Class, or agent:path/to/file.py:function"
            raise ConfigError("environment.path", "names no class", self.path, fix)
        if self.step_timeout_s > self.max_seconds:
            problem = f"must be at most environment.max_seconds ({self.max_seconds:g})"
            raise ConfigError("environment.step_timeout_s", problem, self.step_timeout_s)

    @property
    def enabled(self) -> bool:
        """Whether completions are episodes."""
        return self.path is not None

    @property
    def has_source(self) -> bool:
        """Whether `path` says where its source is."""
        return self.path is not None and not self.path.startswith((OPENENV, VERIFIERS))

    @property
    def is_agent(self) -> bool:
        """Whether it is a program that calls the model by itself."""
        return self.path is not None and self.path.startswith((AGENT, VERIFIERS))
