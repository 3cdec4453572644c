"""The fleet of a run: the processes that generate, and a learner whose weights they generate with.

    learner         all of its ranks: the next life resumes from a checkpoint in a new branch: `revive_learner`, called
                    by the train loop, which has to go back with it
    rollout worker  as in `fleet`; started again, it catches up with the weights in force

In: where to begin (`Start`, a checkpoint). Out: processes to call, and `publishing`, which brings weights from one to
the others. Invariant: the ranks of the learner are up together or not at all; whichever rank died, it is one death.
Does not own: the train loop (`run`), transfers of weights (`publishing`).
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Self

from asyncdapo.config.config import Config
from asyncdapo.controller.fleet.fleet import Fleet, Placed
from asyncdapo.controller.fleet.process import Process
from asyncdapo.controller.fleet.ranks import LearnerRanks, together
from asyncdapo.controller.fleet.supervisor import Supervisor
from asyncdapo.controller.fleet.weights.publishing import Publishing
from asyncdapo.controller.roles.actors import start_learner
from asyncdapo.controller.roles.opening import Opened, Start
from asyncdapo.errors import RunError

if TYPE_CHECKING:
    from asyncdapo.controller.roles.rollout import RolloutProcess

log = logging.getLogger("controller")


class TrainingFleet(Fleet):
    """Every process of one run."""

    def __init__(self, supervisor: Supervisor, placed: Placed, opened: Opened) -> None:
        super().__init__(supervisor, placed, opened)
        self.learners = LearnerRanks(placed.ranks)
        first, *other_shards = placed.ranks[: placed.config.learner.num_shards]
        self.publishing = Publishing(placed.config.weights, supervisor.waits, first, self.workers, other_shards)

    @classmethod
    async def start(cls, config: Config, supervisor: Supervisor, start: Start, checkpoint: Path | None = None) -> Self:
        """Place and start everything, then make the first weight group. `checkpoint`: what the learner resumes from,
        None for the initial model."""
        fleet = await cls._with_replay_up(config, supervisor, start, with_learner=True)
        learner = asyncio.ensure_future(fleet._bring_up_learner(checkpoint))
        if fleet.placement.shares_gpus:
            await learner
        await asyncio.gather(learner, *map(fleet.bring_up_worker, fleet.first_workers))
        fleet.publishing.learner_has(start.roll_back_to or 0, fleet.opened.branch)
        await fleet.publishing.begin()
        return fleet

    async def keep_current(self, worker: Process[RolloutProcess], *, late: bool) -> None:
        """Send it what the learner has, now or whenever a publish has left it out."""
        if late:
            await self.publishing.catch_up(worker)
        await self.publishing.keep_current(worker)

    async def end_worker(self, worker: Process[RolloutProcess]) -> None:
        """Between two transfers, so that none breaks under it."""
        await self.publishing.let_go(worker)

    def end_peers(self) -> None:
        super().end_peers()
        self.learners.end()

    async def revive_learner(self, death: Exception, checkpoint: Path | None) -> None:
        """Start the learner again from a checkpoint (None: the initial model). The caller then rolls the run back."""
        await self._pause_learner(death)
        await self._bring_up_learner(checkpoint)

    async def end_learner(self) -> None:
        """Kill what is left of it, and wait until no rank can write to a checkpoint any more."""
        self.learners.end()
        await asyncio.gather(*map(self._supervisor.clear, self.learners.ranks))

    async def _pause_learner(self, death: Exception) -> None:
        """Whichever rank died, all of them end, and it is one death."""
        delay_s = self._supervisor.count_death(self.learners.first.name, death)
        log.warning("%s; the learner is started again", death)
        await self.end_learner()
        await asyncio.sleep(delay_s)

    async def _bring_up_learner(self, checkpoint: Path | None) -> None:
        """Start every rank, join them and load the model, until all are up."""
        learners, supervisor = self.learners, self._supervisor
        while True:
            try:
                await asyncio.gather(*map(self.placed.has_room, learners.ranks))
                address = self.opened.learner_address
                starts = (supervisor.start(rank, start_learner, address) for rank in learners.ranks)
                await together(*starts)
                await supervisor.within_start_timeout(learners.first, learners.load(checkpoint))
            except RunError as error:
                if not learners.ended_by(error):
                    raise
                await self._pause_learner(error)
                continue
            supervisor.is_up(*learners.ranks)
            return
