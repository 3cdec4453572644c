"""What an environment of the user's is: a class with these methods, each plain or async. `calculator` is one. Its other
public methods with a docstring are tools, which the model may call (`in_host/tools`).

An object serves one episode. It is made without arguments, in a host process, and its methods are called one after the
other. Several objects live in a host at a time. Does not own: how hosts are killed (`hosts`), what is tokenised when
(rollout).
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol

from asyncdapo.messages import Text

Observation = Text | None
Step = Observation | tuple[Observation, float]
"""An observation, or one with a reward. None ends the episode."""


class Environment(Protocol):
    """One episode. An error that a method raises is a failure of the environment, never of the model: the episode is
    sampled again (`environment.retries`), and then its group fails."""

    def reset(self, row: dict[str, Any]) -> Observation | Awaitable[Observation]:
        """Begin. `row` has the prompt's text and its `answer`, `source` and `row`. Returns what the model reads first;
        None is the row's prompt."""
        ...

    def step(self, response: str) -> Step | Awaitable[Step]:
        """Answer a response that calls no tool, its text without special tokens. Without this method, which a class
        with tools may leave out, such a response is the last. The rewards of all steps are summed up; any finite number
        is allowed. The sum is the episode's `acc`, and is scaled like the verdict of a verifier."""
        ...


class Measured(Environment, Protocol):
    """An environment with numbers of its own."""

    def metrics(self) -> dict[str, float] | Awaitable[dict[str, float]]:
        """Finite numbers about the episode, asked for at its end. They are logged like the metrics of a verifier."""
        ...
