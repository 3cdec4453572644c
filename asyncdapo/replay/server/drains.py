"""Drains: workers that are asked to leave, until they hold nothing any more.

In: who is to leave, and what workers hold. Out: the moment when one of them holds nothing, at the latest after a given
time. Invariant: a worker that is to leave gets nothing more, in this session (`Session.leaving`). Does not own: what
becomes of what it still holds then (`workers`), its process (the controller).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from asyncdapo.replay.server.evaluations import Evaluations
from asyncdapo.replay.server.sessions import Session, Sessions


class Drains:
    """Of all workers."""

    def __init__(self, sessions: Sessions, evaluations: Evaluations) -> None:
        self._sessions, self._evaluations = sessions, evaluations
        self._done: dict[int, asyncio.Event] = {}
        """By worker."""

    async def drain(self, session: Session, within_s: float) -> None:
        """Wait until the worker holds neither a lease nor a request, at most `within_s`."""
        session.leaving = True
        done = self._done[session.worker] = asyncio.Event()
        self.note()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await done.wait()
        if self._done.get(session.worker) is done:  # else it was asked once more
            del self._done[session.worker]

    def note(self) -> None:
        """Something may have ended."""
        for worker, done in self._done.items():
            if not (self._sessions.held_by(worker) or self._evaluations.held_by(worker)):
                done.set()
