"""Tests that are coroutines: each in an event loop of its own, ended after `TEST_TIMEOUT_S`. What other tasks are still
going to do is waited for."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable

TEST_TIMEOUT_S = 60.0
"""Only a test that fails waits as long as this. On a busy machine a second of work takes ten."""


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), TEST_TIMEOUT_S))

    return run


async def until(condition: Callable[[], object]) -> None:
    """Lets other tasks, threads and processes run until it holds; raises TimeoutError when it doesn't come to."""
    async with asyncio.timeout(TEST_TIMEOUT_S / 2):
        while not condition():
            await asyncio.sleep(0.001)
