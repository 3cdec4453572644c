"""A trial of an environment before a run starts: episodes with a scripted response, and a call of an unknown tool.

In: rows. Out: what the environment said to them; or EpisodeError, RunError with the first thing that is wrong,
ConfigError for an interpreter that is none. Does not own: whether that can be encoded (the caller has the tokenizer).
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from asyncdapo.environment.config import EnvironmentConfig
from asyncdapo.environment.host import log
from asyncdapo.environment.hosts import Hosts, Row, Session
from asyncdapo.errors import ConfigError, EpisodeOver
from asyncdapo.messages import Text
from asyncdapo.model.tool_calls import ToolCall, Tools

RESPONSE = "Answer: 0"
"""A model may say anything; an environment has an answer to it."""
INTERPRETER_S = 60.0
IS_RECENT = "import sys; print(sys.version_info >= (3, 11))"


@dataclass(frozen=True)
class Said:
    """What an environment said in one episode."""

    tools: Tools
    first: Text | None
    """None: the row's prompt."""
    observations: list[Text] = field(default_factory=list)


@contextmanager
def told_once() -> Iterator[None]:
    """What goes wrong in a trial is raised: the log doesn't say it as well, with each try."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def check_interpreter(python: str | None) -> None:
    """Raises ConfigError for an `environment.python` in which no host can run."""
    if python is None:
        return
    try:
        told = subprocess.run([python, "-c", IS_RECENT], capture_output=True, timeout=INTERPRETER_S, check=False)
        problem = "" if told.stdout.strip() == b"True" else "is no interpreter of Python 3.11 or later"
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = f"can't be run ({getattr(error, 'strerror', 'it took too long')})"
    if problem:
        raise ConfigError("environment.python", problem, python, "path/to/environment/bin/python")


def try_environment(config: EnvironmentConfig, max_context: int, rows: Sequence[Row]) -> list[Said]:
    """Raises ConfigError, EpisodeError, RunError."""
    check_interpreter(config.python)

    async def play(session: Session) -> Said:
        said = Said(session.tools, await session.reset())
        try:
            if session.tools:
                said.observations.append(await session.use_tools([ToolCall("no_such_tool")]))
            observation, _ = await session.step(RESPONSE)
        except EpisodeOver:
            return said
        if observation is not None:
            said.observations.append(observation)
        await session.end()
        return said

    async def trial() -> list[Said]:
        hosts = Hosts(replace(config, processes=1, retries=0), max_context)
        await hosts.start()
        try:
            return [await hosts.in_environment(row, play) for row in rows]
        finally:
            await hosts.stop()

    with told_once():
        return asyncio.run(trial())
