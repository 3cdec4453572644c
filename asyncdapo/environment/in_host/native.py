"""An episode in an environment of the native contract (`environment/contract`), as a host plays it.

In: the user's class. Out: what its methods return, unchecked. The adapters for environments of other shapes are
subclasses: they turn the same calls into theirs. Does not own: checks, threads (`Episodes`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from asyncdapo.environment.in_host.answers import UnusableError
from asyncdapo.environment.in_host.tools import refusal, schema_of, told, told_error, tool_methods

Run = Callable[..., Awaitable[Any]]
"""(function, *arguments, **arguments) -> what it returns. A plain function runs in a thread."""


class Native:
    """A class of the native contract: what it offers, and how an episode is made of it."""

    reserved = ("reset", "step", "metrics")
    """Methods that aren't tools."""
    shows_returned = False
    """Whether schemas of tools say what they return."""
    told = staticmethod(told)
    """What the model reads of a tool's result."""

    def __init__(self, cls: type) -> None:
        """Raises UnusableError for a class that is no environment."""
        self.cls = cls
        self.methods = tool_methods(cls, self.reserved)
        shows = self.shows_returned
        self.tools = [schema_of(name, method, shows_returned=shows) for name, method in self.methods.items()]
        self.check()

    def check(self) -> None:
        """Raises UnusableError for a class of another shape."""
        if not hasattr(self.cls, "reset"):
            raise UnusableError(f"{self.cls.__name__} has no method reset")
        if not hasattr(self.cls, "step") and not self.tools:
            raise UnusableError(f"{self.cls.__name__} has neither a method step nor tools: methods with a docstring")

    def episode(self, run: Run) -> Episode:
        return Episode(self, run)


class Episode:
    """One episode."""

    def __init__(self, shape: Native, run: Run) -> None:
        self._shape, self._run = shape, run
        self._environment: Any = None

    async def reset(self, row: dict[str, Any]) -> Any:
        """The observation."""
        self._environment = await self._run(self._shape.cls)
        return await self._run(self._environment.reset, row)

    async def step(self, response: str) -> Any:
        """The observation, or it and a reward. Without a method `step`, a response that calls no tool is the last."""
        step = getattr(self._environment, "step", None)
        return await self._run(step, response) if step else None

    async def use_tools(self, calls: list[dict[str, Any]]) -> list[dict[str, str]]:
        """A message for each call, in order."""
        messages = []
        for call in calls:
            content = refusal(call, self._shape.methods)
            if not content:
                try:
                    method = getattr(self._environment, call["name"])
                    content = self._shape.told(await self._run(method, **call["arguments"]))
                except Exception as error:  # noqa: BLE001 - whatever it raises, the model is told
                    content = told_error(error)
            messages.append({"role": "tool", "name": call["name"], "content": content})
        return messages

    async def end(self) -> tuple[Any, Any]:
        """Metrics, and the reward that it gives at the end."""
        metrics = getattr(self._environment, "metrics", None)
        return await self._run(metrics) if metrics else {}, 0.0

    async def close(self) -> None:
        """Called once, whatever has happened; perhaps even before `reset`."""
