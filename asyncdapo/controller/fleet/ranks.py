"""The learner's processes, one per rank, which live and die together.

    rank 0     the process `learner`: also sends weights and commits checkpoints
    rank r     `learner-r`: trains on its share of every update, and has its shard of the weights

In: commands for one of them or for all. Out: their answers. Invariant: a rank alone is worth nothing, since the others
wait for it in the next sum: the death of one is the death of all, whether Ray reports it or the others notice that
their group is broken. All of them are then started again from a checkpoint and make a new group. With one rank there is
no group, and everything here is about one process. Does not own: when they are started (`fleet`), what a train step
does (`run`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncdapo.controller.fleet.process import CAUSE_GRACE_S, Params, Pick, Process, ProcessDied, R
from asyncdapo.errors import RanksError, RunError
from asyncdapo.transport.backend import fitting_backend

if TYPE_CHECKING:
    from asyncdapo.controller.roles.learner import LearnerProcess

log = logging.getLogger("learner")


class LearnerRanks:
    """The ranks of one learner, rank 0 first."""

    def __init__(self, ranks: Sequence[Process[LearnerProcess]]) -> None:
        self.ranks = ranks

    @property
    def first(self) -> Process[LearnerProcess]:
        """Rank 0, the only one that others talk to."""
        return self.ranks[0]

    async def call_all(self, pick: Pick[LearnerProcess, Params, R], *args: Params.args, **kwargs: Params.kwargs) -> R:
        """What rank 0 answers to a command that every rank gets; the others' answers are the same or nothing."""
        return (await self.call_each(pick, *args, **kwargs))[0]

    async def call_each(
        self, pick: Pick[LearnerProcess, Params, R], *args: Params.args, **kwargs: Params.kwargs
    ) -> list[R]:
        """What the ranks answer to a command that every rank gets, rank 0 first."""
        try:
            return await together(*(rank.call(pick, *args, **kwargs) for rank in self.ranks))
        except RunError as error:
            if self.ended_by(error):
                self.end()  # before anybody may ask rank 0 for weights in the middle of a step
            raise

    async def load(self, checkpoint: Path | None) -> None:
        """Join the ranks, and have them load the model, resumed from the checkpoint if there is one. All have started;
        from now on they can train. Raises RunError when replicas have other weights than each other."""
        await self._connect()
        await self.call_all(lambda rank: rank.load, checkpoint)

    async def _connect(self) -> None:
        """Make the group of the ranks: over NCCL where each has a GPU of its own, else over Gloo."""
        if len(self.ranks) == 1:
            return
        devices = await together(*(rank.call(lambda rank: rank.device) for rank in self.ranks))
        backend, reason = fitting_backend(dict(zip((rank.name for rank in self.ranks), devices, strict=True)))
        address = await self.first.call(lambda rank: rank.host_ranks, backend)
        await self.call_all(lambda rank: rank.join_ranks, address, backend)
        log.info("%d ranks are connected by %s: %s", len(self.ranks), backend, reason)

    def ended_by(self, error: Exception) -> bool:
        """Whether the error says that a rank is gone."""
        names = {rank.name for rank in self.ranks}
        return isinstance(error, RanksError) or (isinstance(error, ProcessDied) and error.name in names)

    def end(self) -> None:
        """Kill what is left of them."""
        for rank in self.ranks:
            rank.end()


async def together(*calls: Coroutine[Any, Any, R]) -> list[R]:
    """All answers. The first failure ends the wait for the others: they may wait for the one that failed.

    It raises a death if there is one, which is known a moment after the others notice it; else what a process raised on
    purpose; else that they lost each other."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if any(isinstance(error, RanksError) for error in _errors(tasks)):
            await asyncio.wait(tasks, timeout=CAUSE_GRACE_S)
        for error in sorted(_errors(tasks), key=_rank_of_cause):
            raise error
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _errors(tasks: Sequence[asyncio.Task[Any]]) -> list[BaseException]:
    return [error for task in tasks if task.done() and not task.cancelled() and (error := task.exception())]


def _rank_of_cause(error: BaseException) -> int:
    if isinstance(error, ProcessDied):
        return 0
    return 2 if isinstance(error, RanksError) else 1
