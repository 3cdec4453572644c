"""A learner that counts its weights instead of training them, behind the product's own batch feed.

In: batches. Out: checkpoints, and a record of its own of what it trained on, which the judge compares with the ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from asyncdapo import faults
from asyncdapo.learner.batches.batches import Batches
from asyncdapo.learner.batches.feed import BatchFeed
from asyncdapo.shares import Batch, NoBatch
from asyncdapo.transport.payload import Payload
from tests.simulation.disk import Checkpoint
from tests.simulation.process import Process
from tests.simulation.replay import LEARNER_ADDRESS

if TYPE_CHECKING:
    from tests.simulation.world import World

NUM_KEPT = 2
"""Checkpoints kept beside that of step 0."""


class Learner(Process):
    """Counts its weights instead of training them, and remembers what it trained on."""

    role = "learner"

    def __init__(self, world: World, checkpoint: Checkpoint | None, last_step: int) -> None:
        super().__init__(world, "learner")
        self.lineage = list(checkpoint.lineage) if checkpoint else [0]
        """Number of the weights of each version, the initial ones first; no two are ever the same."""
        self.trained = dict(checkpoint.trained) if checkpoint else {}
        """(prompt_id, group_id) of the groups of each batch."""
        feed = self.inside(BatchFeed, LEARNER_ADDRESS, world.disk.run_dir)
        self._batches: Batches[tuple[Batch, Payload]] = Batches(feed, self._prepare, spawn=self.spawn)
        self._last_step = last_step

    async def take_batch(self, step: int) -> str:
        """Returns why there is none, once the data is used up."""
        preparing = await self._batches.receive(step)
        if isinstance(preparing, NoBatch):
            return preparing.reason
        self._batch, payloads = await preparing
        self.world.judge.batch_arrived(self, self._batch, payloads)
        return ""

    async def _prepare(self, batch: Batch, payloads: Sequence[Payload]) -> tuple[Batch, Sequence[Payload]]:
        """Perhaps while another batch is trained."""
        self.world.judge.batch_cut(batch, early=batch.step > len(self.lineage))
        return batch, payloads

    async def train_step(self) -> dict[str, float]:
        faults.point("before_train")
        step = self._batch.step
        if step < self._last_step:
            self._batches.ask(step + 1)
        await asyncio.sleep(self.world.plan.train_s)
        self.lineage.append(self.world.new_weights())
        self.trained[step] = [(group.prompt_id, group.lease_id) for group in self._batch.groups]
        faults.point("after_train")
        return {"learner/version": step - 1, "learner/loss": 0.5}

    async def send_weights(self) -> tuple[int, int]:
        """Their version and number."""
        faults.point("in_send_weights")
        return len(self.lineage) - 1, self.lineage[-1]

    async def save(self, step: int) -> None:
        await asyncio.sleep(0.1)
        faults.point("in_checkpoint")
        kept = self.world.disk.checkpoints
        kept[step] = Checkpoint(step, list(self.lineage), dict(self.trained))
        for old in sorted(old for old in kept if old > 0)[:-NUM_KEPT]:
            del kept[old]
        faults.point("after_checkpoint")
