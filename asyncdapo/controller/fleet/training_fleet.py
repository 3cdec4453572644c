"""The fleet of a run: the processes that generate, and a learner whose weights they generate with.

    learner         all of its ranks: the next life goes on from a checkpoint in a new branch: `revive_learner`, called
                    by the train loop, which has to go back with it
    rollout worker  as in `fleet`, and catches up with the weights in force when it was started again

In: where to begin (`Start`, a checkpoint). Out: processes to call, and `publishing`, which brings weights from one to
the others. Invariant: the ranks of the learner are up together or not at all; whichever rank died, it is one death.
Does not own: the train loop (`run`), transfers of weights (`publishing`).
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.fleet import Fleet
from asyncdapo.controller.fleet.placement import learner_names
from asyncdapo.controller.fleet.process import Process
from asyncdapo.controller.fleet.publishing import Publishing
from asyncdapo.controller.fleet.ranks import Learners, together
from asyncdapo.controller.roles.actors import LearnerActor, start_learner
from asyncdapo.controller.roles.opening import Start
from asyncdapo.errors import RunError

log = logging.getLogger("controller")


class TrainingFleet(Fleet):
    """Every process of one run."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.ranks = learner_names(config)

    async def start(self, start: Start, checkpoint: Path | None = None) -> None:
        """Place and start everything, then make the first weight group. `checkpoint`: what the learner goes on from,
        none for the initial model."""
        placed = await self.make()
        config = self.config
        self.learners = Learners(
            [
                placed(LearnerActor, self.spec("learner", rank), threads=config.learner.threads)
                for rank in range(config.learner.ranks)
            ]
        )
        self.processes = [self.replay, *self.learners.ranks, *self.workers]
        self.publishing = Publishing(config.weights, self.learners.first, self.workers)
        self.opened = await self._bring_up_replay(start)
        learner = asyncio.ensure_future(self._bring_up_learner(checkpoint))
        if self.placement.shares_gpus:
            await learner
        await asyncio.gather(learner, *map(self._bring_up_worker, self.workers))
        self.publishing.learner_has(start.roll_back_to or 0, self.opened.branch)
        await self.publishing.begin()

    async def catch_up(self, worker: Process) -> None:
        """Send it what the learner has."""
        await self.publishing.catch_up(worker)

    async def revive_learner(self, death: Exception, checkpoint: Path | None) -> None:
        """Start the learner again from a checkpoint (none: the initial model). It has yet to be rolled back to."""
        await self._pause_learner(death)
        await self._bring_up_learner(checkpoint)

    async def end_learner(self) -> None:
        """Kill what is left of it, and wait until no rank can write to a checkpoint any more."""
        self.learners.end()
        await asyncio.gather(*map(self._clear, self.learners.ranks))

    async def _pause_learner(self, death: Exception) -> None:
        """As `_pause`: whichever rank died, all of them end, and it is one death."""
        delay_s = self.restarts.delay_s(self.learners.first.name, death)
        log.warning("%s; the learner is started again", death)
        await self.end_learner()
        await asyncio.sleep(delay_s)

    async def _bring_up_learner(self, checkpoint: Path | None) -> None:
        """Start every rank, and join them, until all are up."""
        learners = self.learners
        while True:
            try:
                starts = (
                    self._spawn(rank, start_learner, self.opened.learner_address, checkpoint) for rank in learners.ranks
                )
                await together(*starts)
                await self._within_start_timeout(learners.first, learners.connect())
            except RunError as error:
                if not learners.ended_by(error):
                    raise
                await self._pause_learner(error)
                continue
            for rank in learners.ranks:
                rank.up.set()
            self.note_progress()
            return
