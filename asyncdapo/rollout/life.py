"""Life of an engine: not started, alive, over. Its end reaches every waiting caller at once.

In: its start, and how it ended. Out: an EngineError with the cause, for every pending and every later call. Invariant:
only the first end counts, and every future passed to `end` gets the error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from asyncdapo.errors import EngineError


class Life:
    """The life of one engine, in one event loop."""

    def __init__(self, engine: str) -> None:
        """`engine`: its name in errors, "the torch engine"."""
        self._engine = engine
        self._problem: str | None = f"{engine} has not been started"
        self._cause: BaseException | None = None
        self._ended: asyncio.Future[None] | None = None
        """None before the start."""

    def begin(self) -> None:
        """The engine is alive from now on. Call it in the event loop."""
        self._ended = asyncio.get_running_loop().create_future()
        self._problem = None

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when the engine is over."""
        assert self._ended is not None, "the engine has not been started"
        return self._ended

    @property
    def alive(self) -> bool:
        return self._problem is None

    def require(self) -> None:
        """Raises EngineError unless the engine is alive."""
        if not self.alive:
            raise self._error()

    def end(self, cause: BaseException | None, waiting: Iterable[asyncio.Future[Any] | None]) -> None:
        """The engine is over: it failed with this cause, or was stopped (None). All waiting callers get an EngineError.
        Does nothing if the engine isn't alive."""
        if not self.alive:
            return
        self._problem = f"{self._engine} failed: {cause}" if cause else f"{self._engine} was stopped"
        self._cause = cause
        for future in waiting:
            if future is not None and not future.done():
                future.set_exception(self._error())
        if cause:
            self.ended.set_exception(self._error())
            self.ended.exception()  # marks it as seen, in case nobody waits for it
        else:
            self.ended.set_result(None)

    async def over(self) -> None:
        """Wait until the engine is over: see `Engine.ended`."""
        self.require()
        await asyncio.shield(self.ended)

    def _error(self) -> EngineError:
        error = EngineError(self._problem)
        error.__cause__ = self._cause
        return error
