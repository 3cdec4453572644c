"""The episodes under way in a host.

In: requests. Out: an answer to each, whatever the user's code does. Async methods run in the event loop, others in
threads. Does not own: what is called (`native`), what may be returned (`answers`).
"""

from __future__ import annotations

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asyncdapo.environment.in_host.agent import Agent
from asyncdapo.environment.in_host.answers import (
    Answer,
    BrokenContractError,
    describe,
    finite,
    graded,
    observed,
    read_metrics,
)
from asyncdapo.environment.in_host.native import Native
from asyncdapo.environment.in_host.openenv import OpenEnv
from asyncdapo.environment.in_host.verifiers_taskset import Taskset


class Episodes:
    """The episodes under way."""

    def __init__(self, environment: Native | Agent | OpenEnv | Taskset, concurrency: int, max_chars: int) -> None:
        self._environment, self._max_chars = environment, max_chars
        self._threads = ThreadPoolExecutor(concurrency)
        self._episodes: dict[int, Any] = {}

    async def answer(self, request: dict[str, Any]) -> Answer:
        """What the environment says to a request. Never raises."""
        try:
            return await self._do(request["episode"], request["do"], request["given"])
        except BrokenContractError as error:
            return {"broke": f"{request['do']}: {error}"}
        except BaseException as error:  # noqa: BLE001 - whatever it raises fails only its episode
            return {"raised": f"{request['do']}: {describe(error)}"}

    async def _do(self, number: int, do: str, given: Any) -> Answer:
        if do == "drop":
            if number in self._episodes:
                await self._episodes.pop(number).close()
            return {}
        if do in ("reset", "run"):
            self._episodes[number] = self._environment.episode(self._run)
        episode = self._episodes[number]
        match do:
            case "run":
                return graded(await episode.run(**given))
            case "reset":
                return observed(await episode.reset(given), self._max_chars)
            case "tools":
                return observed(await episode.use_tools(given), self._max_chars)
            case "end":
                metrics, reward = await episode.end()
                return {"metrics": read_metrics(metrics), "reward": finite("a reward", reward)}
        return self._stepped(await episode.step(given))

    def _stepped(self, said: Any) -> Answer:
        if not isinstance(said, tuple):
            return observed(said, self._max_chars)
        if len(said) != 2:
            raise BrokenContractError(f"returned a tuple of {len(said)}; (observation, reward) has two")
        return observed(said[0], self._max_chars) | {"reward": finite("a reward", said[1])}

    async def _run(self, function: Any, /, *given: Any, **named: Any) -> Any:
        """Async functions run in the event loop, others in a thread."""
        if inspect.iscoroutinefunction(function):
            return await function(*given, **named)

        def call() -> tuple[Any, BaseException | None]:
            try:
                return function(*given, **named), None
            except BaseException as error:  # noqa: BLE001 - as a value: a future can't carry a StopIteration
                return None, error

        returned, error = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        if error is not None:
            raise error
        return await returned if inspect.isawaitable(returned) else returned
