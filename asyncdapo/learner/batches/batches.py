"""The learner's next batch: asked for, received and prepared while the learner trains on the one before.

    ask(k + 1) ──CutWanted──▶ replay ──Batch──▶ feed ──read, prepare, each in a thread──▶ Prepared
                                                  └── or NoBatch, kept for whoever wants batch k + 1

In: the step of a batch. `ask` gets it early, when train step k begins; `ahead` shows it as soon as it is ready;
`receive` gets it when the batch is wanted. Out: the batch, ready to train on, or the news that there is none. An error
of the early question is raised by `receive`, one of the reading by the task that it returns: who waits for that one
waits for storage, not for the replay server.

Why an early batch keeps the staleness bound: the core checks every member against the number of the step that will
train on it, whenever the batch is cut, and the learner checks again before it trains. But an early cut could end
running groups that would still have made the batch. Replay waits with the cut as long as that is so (`state.py`). Under
a bound of 0 there is nothing to cut before version k is published, so the early question waits like any other.

Invariants: at most one batch is ahead of the one in training, so a rank holds the tokens of at most two batches. A
batch is only trained in the branch in which it was cut: a rollback begins when every rank is dead, so a batch that was
ahead is gone with its process, and is cut again. Does not own: questions and answers on the wire (`feed`), when a batch
is cut (`replay/core/state`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from asyncdapo.errors import RunError
from asyncdapo.learner.batches.feed import BatchFeed, Share
from asyncdapo.shares import Batch, NoBatch
from asyncdapo.transport.payload import Payload

P = TypeVar("P")
Spawn = Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]


class Batches(Generic[P]):
    """The batches of one rank. Use it in one event loop."""

    def __init__(
        self,
        feed: BatchFeed,
        prepare: Callable[[Batch, Sequence[Payload]], Awaitable[P]],
        *,
        spawn: Spawn = asyncio.ensure_future,
    ) -> None:
        """`spawn` starts the task that runs beside the train step."""
        self._feed, self._prepare, self._spawn = feed, prepare, spawn
        self._coming: tuple[int, asyncio.Task[NoBatch | asyncio.Task[P]]] | None = None

    def ask(self, step: int) -> None:
        """Begin to bring batch `step`. Asking again changes nothing. Raises RunError while another one is coming."""
        if self._coming is None:
            self._coming = step, self._spawn(self._bring(step))
        elif self._coming[0] != step:
            raise RunError(f"batch {step} was asked for, but batch {self._coming[0]} is not taken yet")

    async def receive(self, step: int) -> NoBatch | asyncio.Task[P]:
        """Wait for batch `step`. Returns the task that reads and prepares it, or the news that there is none."""
        self.ask(step)
        assert self._coming is not None, "it has just been asked for"
        _, bringing = self._coming
        brought = await asyncio.shield(bringing)  # a caller that is cancelled may ask again
        if not isinstance(brought, NoBatch):
            self._coming = None
        return brought

    async def ahead(self, step: int) -> P | None:
        """Wait until batch `step`, which was asked for, is prepared. It stays here until it is received. None for one
        that doesn't come, of which `receive` says why."""
        assert self._coming is not None, "`ask` comes first"
        coming, bringing = self._coming
        assert coming == step, f"it is batch {coming} that comes"
        await asyncio.wait([bringing])
        if bringing.cancelled() or bringing.exception() or isinstance(brought := bringing.result(), NoBatch):
            return None
        await asyncio.wait([brought])
        return None if brought.cancelled() or brought.exception() else brought.result()

    async def close(self) -> None:
        """Cancel what is on its way, and close the connection."""
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

    async def _prepared(self, batch: Batch, share: Share) -> P:
        return await self._prepare(batch, await self._feed.read(batch.step, share))
