"""The learner's next batch, brought while it trains: asked for, received and prepared before it is wanted.

    ask(k + 1) ──CutWanted──▶ replay ──Batch──▶ feed ──prepare, in a thread of its own──▶ Prepared
                                                  └── or NoBatch, kept for whoever wants batch k + 1

In: the step of a batch, early (`ask`, when train step k begins) or when it is wanted (`receive`). Out: the batch, ready
to train on, or the news that there is none. An error of the early question is raised where the batch is wanted.

Why an early batch keeps the staleness bound: staleness is (k + 1) − 1 − min_version whenever the batch was cut, and the
core checks every member against the number of the step, not against what is trained then; the learner checks again
before it trains. An early cut can end what runs too early, though, and so lose slow groups that would still have made
it; therefore replay holds one back while it would (`state.py`). At the barrier there is nothing to cut before version k
is published, so there the early question waits like any other.

Invariants: at most one batch is ahead of the one that is trained, so this rank holds two payloads at most. A batch is
never trained in another branch than its own: a rollback begins when every rank is dead, and what was ahead is gone with
the process; batch k + 1 is then cut as it was. Does not own: questions and answers on the wire (`feed`), when a batch
is cut (`replay/state`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from asyncdapo.errors import RunError
from asyncdapo.learner.batches.feed import BatchFeed
from asyncdapo.messages import Batch, NoBatch
from asyncdapo.payload import Payload

P = TypeVar("P")
Spawn = Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]


class Batches(Generic[P]):
    """The batches of one rank. Use it in one event loop."""

    def __init__(
        self,
        feed: BatchFeed,
        prepare: Callable[[Batch, Payload], Awaitable[P]],
        *,
        spawn: Spawn = asyncio.ensure_future,
    ) -> None:
        """`spawn` makes a task of what goes on beside the train step."""
        self._feed, self._prepare, self._spawn = feed, prepare, spawn
        self._coming: tuple[int, asyncio.Task[NoBatch | asyncio.Task[P]]] | None = None

    def ask(self, step: int) -> None:
        """Bring batch `step` from now on. Asked again, nothing changes. Raises RunError while another one comes."""
        if self._coming is None:
            self._coming = step, self._spawn(self._bring(step))
        elif self._coming[0] != step:
            raise RunError(f"batch {step} was asked for, but batch {self._coming[0]} is still to be taken")

    async def receive(self, step: int) -> NoBatch | asyncio.Task[P]:
        """Wait until batch `step` is here. Returns its preparation, which has begun, or the news that there is none."""
        self.ask(step)
        _, bringing = self._coming
        brought = await asyncio.shield(bringing)  # whoever gives up waiting may ask again
        if not isinstance(brought, NoBatch):
            self._coming = None
        return brought

    async def close(self) -> None:
        """Give up what is on its way, and the connection."""
        if self._coming:
            _, bringing = self._coming
            bringing.cancel()
            for brought in await asyncio.gather(bringing, return_exceptions=True):
                if isinstance(brought, asyncio.Task):
                    brought.cancel()
                    await asyncio.gather(brought, return_exceptions=True)
            self._coming = None
        self._feed.close()

    async def _bring(self, step: int) -> NoBatch | asyncio.Task[P]:
        taken = await self._feed.take(step)
        return taken if isinstance(taken, NoBatch) else self._spawn(self._prepared(*taken))

    async def _prepared(self, batch: Batch, payload: Payload) -> P:
        return await self._prepare(batch, payload)
