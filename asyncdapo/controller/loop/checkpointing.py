"""Checkpoints of a run: copied to host memory between two updates, written while the next steps are trained.

    train step k ── ranks compared ── copied ── train step k + 1 ── …
                                         └── every rank writes its part ── rank 0 commits ── replay frees payloads

In: the step that is done, and what the run has used up by it. Out: checkpoints, written by the learner's ranks, and two
times of each: what training waited for, and what writing took beside it. Invariants: at most one is being written, and
the next one waits for it; whatever dies meanwhile, the newest whole one stands. An error of the writing is raised where
the train loop looks for it. Does not own: when one is due (`training`), what is in one (`learner/storage`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from asyncdapo import faults
from asyncdapo.controller.fleet.stalls import StallWatch
from asyncdapo.controller.fleet.training_fleet import TrainingFleet
from asyncdapo.controller.loop.background import BackgroundWork
from asyncdapo.learner.storage.checkpoint import oldest_kept


class Checkpointing:
    """The checkpoints of one launch."""

    def __init__(self, fleet: TrainingFleet, stalls: StallWatch, step: int) -> None:
        """`step`: that of the checkpoint from which the run resumes."""
        self._fleet, self._stalls = fleet, stalls
        self.step = step
        """Of the last one that was copied."""
        self._num_bytes = 0
        self._writing = BackgroundWork(0, 0)

    async def begin(self, step: int, counters: dict[str, int]) -> None:
        """Copy a checkpoint, and have it written from now on. Waits for the one before."""
        await self.written()
        learners, branch = self._fleet.learners, self._fleet.publishing.branch
        compared = learners.call_all(lambda learner: learner.check_ranks)
        await self._stalls.wait(compared, whom="learner", what="the ranks' weights to be compared")
        began = time.monotonic()
        copied = learners.call_each(lambda learner: learner.copy_checkpoint, step)
        num_bytes = await self._stalls.wait(copied, whom="learner", what=f"a copy of the weights of step {step}")
        self.step, self._num_bytes, copy_s = step, sum(num_bytes), time.monotonic() - began
        self._writing.begin(lambda: self._write(step, branch, counters, copy_s))

    async def _write(self, step: int, branch: int, counters: dict[str, int], copy_s: float) -> dict[str, float]:
        learners, began = self._fleet.learners, time.monotonic()
        pieces = await learners.call_each(lambda learner: learner.write_checkpoint, step)
        written = [piece for of_rank in pieces for piece in of_rank]
        await learners.first.call(lambda learner: learner.commit_checkpoint, step, branch, counters, written)
        write_s = time.monotonic() - began
        faults.point("after_checkpoint")
        oldest = await asyncio.to_thread(oldest_kept, Path(self._fleet.config.run.dir))
        await self._fleet.replay.ask(lambda replay: replay.covered, oldest)
        return {"learner/checkpoint_copy_s": copy_s, "learner/checkpoint_write_s": write_s}

    async def written(self, before: Callable[[str], None] = lambda _: None) -> None:
        """Wait until none is being written; `before` is told what is waited for, if anything is."""
        if self._writing.task is None:
            return
        if not self._writing.task.done():
            before(f"the checkpoint of step {self.step} ({self._num_bytes / 2**20:.1f} MiB) to be written")
        what = f"the checkpoint of step {self.step} to be written"
        await self._stalls.wait(asyncio.shield(self._writing.task), whom="learner", what=what)

    def take(self) -> dict[str, float]:
        """The two times of one that was written since the last time; raises what ended its writing."""
        return self._writing.take()

    async def go_back(self, step: int) -> None:
        """The learner is gone, and what it was writing; the run resumes from the checkpoint of `step`."""
        await self._writing.cancel()
        self.step = step
