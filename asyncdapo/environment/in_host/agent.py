"""A program that calls the model by itself: `run(row, base_url, api_key)`, as a host runs it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

from asyncdapo.environment.in_host.answers import UnusableError
from asyncdapo.environment.in_host.native import Run


class Agent:
    """What `agent:` names."""

    tools: tuple[()] = ()

    def __init__(self, program: Callable[..., Any]) -> None:
        """Raises UnusableError for what can't be called."""
        try:
            inspect.signature(program).bind({}, "", "")
        except TypeError as error:
            raise UnusableError(f"an agent is called as (row, base_url, api_key): {error}") from error
        self._program = program
        for name in ("no_proxy", "NO_PROXY"):  # a proxy can't reach the endpoint
            os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), "127.0.0.1"])

    def episode(self, run: Run) -> AgentEpisode:
        return AgentEpisode(self._program, run)


class AgentEpisode:
    """One episode: one call."""

    def __init__(self, program: Callable[..., Any], run: Run) -> None:
        self._program, self._run = program, run

    async def run(self, row: dict[str, Any], base_url: str, api_key: str) -> Any:
        """The reward, or it and metrics."""
        return await self._run(self._program, row, base_url, api_key)

    async def close(self) -> None:
        """It has ended, or its process is killed."""
