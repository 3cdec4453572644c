"""SkyRL's environments: a class with `init(prompt)`, `step(action)` and `close()` (skyrl-gym's `BaseTextEnv`).

It is made as SkyRL makes it: with `env_config`, which is empty here, and with `extras`, the row, where the answer
stands as `reward_spec.ground_truth`. `init` is given the prompt as a message of the user's. `get_metrics` is asked at
the end. Its own `max_turns` isn't set; `environment.max_turns` bounds an episode.
"""

from __future__ import annotations

from typing import Any

from asyncdapo.environment.in_host.native import Episode, Native, Run


class SkyRL(Native):
    """A class of SkyRL's. Its environments find the calls in the text themselves."""

    reserved = ()

    def __init__(self, cls: type) -> None:
        self.cls, self.methods, self.tools = cls, {}, []

    def episode(self, run: Run) -> Episode:
        return SkyRLEpisode(self, run)


class SkyRLEpisode(Episode):
    async def reset(self, row: dict[str, Any]) -> Any:
        extras = row | {"reward_spec": {"method": "rule", "ground_truth": row["answer"]}}
        self._environment = await self._run(self._shape.cls, env_config={}, extras=extras)
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt, _ = await self._run(self._environment.init, asked)
        return None if prompt == asked else prompt

    async def step(self, response: str) -> Any:
        said = await self._run(self._environment.step, response)
        return None if said["done"] else said["observations"], said["reward"]

    async def end(self) -> tuple[Any, Any]:
        return await self._run(getattr(self._environment, "get_metrics", dict)), 0.0

    async def close(self) -> None:
        if self._environment is not None:
            await self._run(self._environment.close)
