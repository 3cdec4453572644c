"""TRL's environments: a class with `reset(**row) -> str | None`, tools, and perhaps `get_reward()`; without `step`.

As its `GRPOTrainer(environment_factory=...)` plays them (TRL 1.16): what `reset` returns is appended to the prompt,
every public method is a tool, whose result the model reads as `str` writes it, and a response that calls none ends the
episode. `get_reward` is asked once, at the end.
"""

from __future__ import annotations

import inspect
from typing import Any

from asyncdapo.environment.in_host.answers import UnusableError
from asyncdapo.environment.in_host.native import Episode, Native, Run


class Trl(Native):
    """A class of TRL's. Its model reads the same tokens as there."""

    reserved = ("reset", "get_reward")
    shows_returned = True
    told = str

    def check(self) -> None:
        public = (name for name, _ in inspect.getmembers(self.cls, inspect.isfunction) if name[0] != "_")
        if silent := sorted(set(public) - {*self.reserved, *self.methods}):
            raise UnusableError(f"the tool {silent[0]} of {self.cls.__name__} has no docstring")

    def episode(self, run: Run) -> Episode:
        return TrlEpisode(self, run)


class TrlEpisode(Episode):
    async def reset(self, row: dict[str, Any]) -> Any:
        self._environment = await self._run(self._shape.cls)
        said = await self._run(self._environment.reset, **row)
        return row["prompt"] + said if isinstance(said, str) else said

    async def end(self) -> tuple[Any, Any]:
        return {}, await self._run(self._environment.get_reward)
