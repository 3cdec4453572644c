"""A faulty link in place of a socket's send, if the `faults` section asks for one.

In: messages in order. Out: the same messages, but late, repeated, truncated, reordered or lost, as `faults.Link`
decides. It holds at most `MAX_HELD` messages; then the sender waits. Does not own: the socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from asyncdapo.faults import Frames, Link

MAX_HELD = 1000

Transmit = Callable[[Frames], Coroutine[None, None, None]]


class LossyLink:
    """Carries the messages of one socket. Needs a running event loop."""

    def __init__(self, link: Link) -> None:
        self._link, self._loop = link, asyncio.get_running_loop()
        self._room = asyncio.Semaphore(MAX_HELD)
        self._sending: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._closed = False

    async def carry(self, frames: Frames, transmit: Transmit) -> None:
        """Take a message. `transmit` sends it when it is due. If that fails, the next call of `carry` raises."""
        if self._failure:
            raise self._failure
        for at, faulty in self._link.pass_on(frames, self._loop.time()):
            await self._room.acquire()
            self._loop.call_at(at, self._send, faulty, transmit)

    def _send(self, frames: Frames, transmit: Transmit) -> None:
        if not self._closed:
            task = self._loop.create_task(transmit(frames))
            self._sending.add(task)
            task.add_done_callback(self._note_sent)

    def _note_sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._room.release()
        if not task.cancelled():
            self._failure = self._failure or task.exception()

    def close(self) -> None:
        """Drop the messages that are held."""
        self._closed = True
        for task in self._sending:
            task.cancel()
