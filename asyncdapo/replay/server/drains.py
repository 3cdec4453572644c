"""Drains: workers that are to give up what they hold, until they hold nothing any more.

    drain    a worker that is to leave finishes what it holds; it gets nothing more in this session (`Session.leaving`)
    recall   workers stop their leases, and hand back what is sampled of them; those that can't are left alone

In: who is to do it, and what workers hold. Out: `Recall`, once a heartbeat until it is followed; the moment when all of
it is done, at the latest after a given time. Does not own: what becomes of what is handed back (`arrivals`) and of what
a worker still holds then (`workers`), its process (the controller).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from asyncdapo.messages import Message, Recall
from asyncdapo.replay.server.evaluations import Evaluations
from asyncdapo.replay.server.sessions import Session, Sessions


class Drains:
    """Of all workers."""

    def __init__(self, sessions: Sessions, evaluations: Evaluations, send: Callable[[Session, Message], None]) -> None:
        self._sessions, self._evaluations, self._send = sessions, evaluations, send
        self._waits: dict[asyncio.Event, Callable[[], bool]] = {}
        """What is waited for, and whether it is so."""
        self._recalled: list[Session] = []

    async def drain(self, session: Session, within_s: float) -> None:
        """Wait until the worker holds neither a lease nor a request, at most `within_s`."""
        session.leaving = True
        worker = session.worker
        await self._wait(lambda: not (self._sessions.held_by(worker) or self._evaluations.held_by(worker)), within_s)

    async def recall(self, sessions: Sequence[Session], within_s: float) -> None:
        """Have these workers hand back their leases, within `within_s`. They get no others meanwhile. Those that miss
        heartbeats are not waited for."""
        recalled = [session for session in sessions if session.continues]
        self._recalled += recalled
        self.tick()
        try:
            await self._wait(lambda: not any(map(self._may_follow, recalled)), within_s)
        finally:
            self._recalled = [session for session in self._recalled if session not in recalled]

    def note(self) -> None:
        """Something may have ended."""
        for done, is_so in self._waits.items():
            if is_so():
                done.set()

    def tick(self) -> None:
        """One heartbeat interval has passed: what was said may have been lost."""
        for session in self._recalled:
            if held := self._sessions.held_by(session.worker):
                self._send(session, Recall(lease_ids=list(held)))

    def _may_follow(self, session: Session) -> bool:
        """Whether it still holds leases, and is there to hand them back."""
        return bool(self._sessions.held_by(session.worker)) and not self._sessions.is_late(session)

    async def _wait(self, is_so: Callable[[], bool], within_s: float) -> None:
        done = asyncio.Event()
        self._waits[done] = is_so
        self.note()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await done.wait()
        finally:
            del self._waits[done]
