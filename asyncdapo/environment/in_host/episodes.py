"""The environments of the episodes under way in a host.

In: requests. Out: an answer to each, whatever the user's code does. Async methods run in the event loop, others in
threads.
"""

from __future__ import annotations

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asyncdapo.environment.in_host.answers import (
    Answer,
    BrokenContractError,
    describe,
    finite,
    graded,
    observed,
    read_metrics,
)


class Episodes:
    """The environments of the episodes under way."""

    def __init__(self, make: Any, concurrency: int, max_chars: int) -> None:
        self._make, self._max_chars = make, max_chars
        self._threads = ThreadPoolExecutor(concurrency)
        self._environments: dict[int, Any] = {}

    async def answer(self, request: dict[str, Any]) -> Answer:
        """What the environment says to a request. Never raises."""
        try:
            return await self._do(request["episode"], request["do"], request["given"])
        except BrokenContractError as error:
            return {"broke": f"{request['do']}: {error}"}
        except BaseException as error:  # noqa: BLE001 - whatever it raises fails only its episode
            return {"raised": f"{request['do']}: {describe(error)}"}

    async def _do(self, episode: int, do: str, given: Any) -> Answer:
        if do == "drop":
            self._environments.pop(episode, None)
            return {}
        if do == "end":
            metrics = getattr(self._environments[episode], "metrics", None)
            return {"metrics": read_metrics(await self._call(metrics) if metrics else {})}
        if do == "run":
            return graded(await self._call(self._make, given["row"], given["base_url"], given["api_key"]))
        if do == "reset":
            environment = self._environments[episode] = await self._call(self._make)
            return observed(await self._call(environment.reset, given), self._max_chars)
        said = await self._call(self._environments[episode].step, given)
        if not isinstance(said, tuple):
            return observed(said, self._max_chars)
        if len(said) != 2:
            raise BrokenContractError(f"returned a tuple of {len(said)}; (observation, reward) has two")
        return observed(said[0], self._max_chars) | {"reward": finite("a reward", said[1])}

    async def _call(self, function: Any, *given: Any) -> Any:
        """Async functions run in the event loop, others in a thread."""
        if inspect.iscoroutinefunction(function):
            return await function(*given)

        def call() -> tuple[Any, BaseException | None]:
            try:
                return function(*given), None
            except BaseException as error:  # noqa: BLE001 - as a value: a future can't carry a StopIteration
                return None, error

        returned, error = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        if error is not None:
            raise error
        return await returned if inspect.isawaitable(returned) else returned
