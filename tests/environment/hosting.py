"""Hosts of real processes, and episodes whose responses are scripted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from asyncdapo.environment.config import EnvironmentConfig
from asyncdapo.environment.hosts import Hosts, Play, Session
from asyncdapo.errors import EpisodeOver
from asyncdapo.model.tool_calls import ToolCall
from tests.reward.processes import is_alive

FILE = Path(__file__).with_name("hostile.py")
ANSWERING, SHAPES = (Path(__file__).with_name(name) for name in ("answering.py", "shapes.py"))
MAX_CONTEXT = 1000


@asynccontextmanager
async def hosting(name: str = "Plain", tokenizer: str = "", **keys: Any) -> AsyncIterator[Hosts]:
    """The hosts of an environment in `hostile.py`, or at a path. None of their processes is left at the end."""
    path = name if ":" in name else f"{FILE}:{name}"
    config = EnvironmentConfig(path=path, **({"step_timeout_s": 20.0} | keys))
    hosts = Hosts(config, MAX_CONTEXT, tokenizer)
    await hosts.start()
    pids = hosts.pids()
    try:
        yield hosts
    finally:
        pids += hosts.pids()
        await hosts.stop()
        assert not any(map(is_alive, pids))


def scripted(*responses: str | list[ToolCall], note: Callable[[Any], None] = lambda _: None) -> Play[list[Any]]:
    """An episode of these responses, texts or tool calls: what the environment gave, then the end's reason, the
    rewards, the metrics."""

    async def play(session: Session) -> list[Any]:
        given: list[Any] = [await session.reset()]
        total = 0.0
        for response in responses:
            note(response)
            try:
                if isinstance(response, list):
                    observation, reward = await session.use_tools(response), 0.0
                else:
                    observation, reward = await session.step(response)
            except EpisodeOver as over:
                return [*given, over.finish_reason, total + over.reward]
            given.append(observation)
            total += reward
        metrics, reward = await session.end()
        return [*given, total + reward, metrics]

    return play
