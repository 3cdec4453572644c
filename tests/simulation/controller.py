"""The driver of a simulated run: starts processes, trains step by step, restarts what dies, goes back with the learner.

The order of its commands is that of `asyncdapo/controller/loop/training.py` and `fleet.py`, without Ray, files and
metrics. Its own death ends every other process; the next launch resumes from the checkpoint and the ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from asyncdapo import faults
from asyncdapo.errors import BatchError, RunError
from asyncdapo.eval_messages import EvalRequest, Sampling
from tests.simulation.disk import Checkpoint
from tests.simulation.learner import Learner
from tests.simulation.plan import EVAL_ID, HEARTBEAT_S
from tests.simulation.process import Killed, Process, ProcessDied
from tests.simulation.replay import Replay, prompt_at
from tests.simulation.rollout import Rollout

if TYPE_CHECKING:
    from tests.simulation.world import World

RESTART_S = 1.0
TRANSFER_S = 0.1
JOIN_S = 30.0


class Slot:
    """A place in the fleet, and the process that has it now."""

    def __init__(self) -> None:
        self.process: Any = None
        self.up = asyncio.Event()
        self.life, self.since = 0, 0.0
        self.leaving: tuple[float, float] | None = None
        """How long it may finish what it holds, and for how long it then stays away."""
        self.asked_to_leave = asyncio.Event()

    def leave(self, within_s: float, away_s: float) -> None:
        self.leaving = within_s, away_s
        self.asked_to_leave.set()

    def fill(self, make: Callable[[], Process]) -> None:
        """Raises Killed when the process dies while it is made."""
        self.process = make()
        self.life, self.since = self.life + 1, self.process.world.loop.time()
        self.process.on_death = self.up.clear
        self.up.set()

    async def call(self, make: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """Raises ProcessDied when there is no answer."""
        if not self.up.is_set():
            raise ProcessDied
        return await self.process.call(make(self.process))

    async def ask(self, make: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """Again in its next life when it died under the call."""
        while True:
            await self.up.wait()
            try:
                return await self.call(make)
            except ProcessDied:
                continue

    async def death(self) -> None:
        await asyncio.wait([self.process.dead])


class Controller(Process):
    """One launch."""

    role = "controller"

    def __init__(self, world: World, steps: int) -> None:
        super().__init__(world, "controller")
        self.plan, self.steps = world.plan, steps
        self.replay, self.learner = Slot(), Slot()
        self.workers = [Slot() for _ in range(self.plan.num_workers)]
        self.turn = asyncio.Lock()
        self.step = self.saved = self.version = self.branch = 0
        self.loaded: dict[int, tuple[int, int, int]] = {}
        """Life, branch and version of what each worker generates with."""
        self.leasing, self.no_batch = False, ""
        self.evaluating: asyncio.Task | None = None

    async def run(self) -> None:
        await self._start()
        while True:
            train = self.spawn(self._train())
            await asyncio.wait([train, self.learner.process.dead], return_when=asyncio.FIRST_COMPLETED)
            if train.done() and isinstance(train.exception(), BatchError):
                self.world.note("unreadable batches", str(train.exception()))
                self.learner.process.die("its batch can't be read")
            elif train.done() and self.learner.process.alive:
                return train.result()
            train.cancel()
            await self._go_back()

    def end(self) -> None:
        """The driver is gone, and all that it had started with it."""
        for slot in (self.replay, self.learner, *self.workers):
            if slot.process:
                slot.process.die("the driver is gone")
        self.die("the launch is over")

    async def stop(self) -> None:
        """As Ctrl-C does it. What isn't covered by a checkpoint is undone."""
        if self.leasing:
            self.leasing = False
            await self.replay.ask(lambda replay: replay.server.recall())
        self.die("asked to stop")

    # ---------------------------------------------------------------------------------------------------------- lives

    async def _start(self) -> None:
        new = not self.world.launched
        self.world.launched = True
        checkpoint = self._survey()
        await self._bring_up(self.replay, partial(Replay, self.world, None if new else self.step))
        await self._bring_up(self.learner, partial(Learner, self.world, checkpoint, self.steps))
        for index, slot in enumerate(self.workers):
            await self._bring_up(slot, partial(Rollout, self.world, index))
        self.version, self.branch = self.step, self.replay.process.server.branch
        self.spawn(self._keep_replay())
        for index, slot in enumerate(self.workers):
            self.spawn(self._keep_worker(index, slot))
        if self.plan.kills_silent:
            self.spawn(self._look())
        if not new:
            await self._publish_again()

    async def _bring_up(self, slot: Slot, make: Callable[[], Process]) -> None:
        while True:
            try:
                return slot.fill(make)
            except Killed:
                await asyncio.sleep(RESTART_S)

    async def _keep_replay(self) -> None:
        while True:
            await self.replay.death()
            await asyncio.sleep(RESTART_S)
            await self._bring_up(self.replay, partial(Replay, self.world, None))
            if self.leasing:
                with suppress(ProcessDied):
                    await self.replay.call(lambda replay: replay.server.begin())

    async def _keep_worker(self, index: int, slot: Slot) -> None:
        while True:
            pause_s = RESTART_S
            death, leave = self.spawn(slot.death()), self.spawn(slot.asked_to_leave.wait())
            await asyncio.wait([death, leave], return_when=asyncio.FIRST_COMPLETED)
            try:
                if leave.done() and slot.leaving:
                    pause_s += slot.leaving[1]
                    await self._drain(index, slot, slot.leaving[0])
                slot.asked_to_leave.clear()
                await self.replay.ask(lambda replay: replay.server.lose_worker(index, "gone"))
            except RunError as error:
                self.world.fail(error)
                return
            finally:
                death.cancel()
                leave.cancel()
            await asyncio.sleep(pause_s)
            await self._bring_up(slot, partial(Rollout, self.world, index))
            self.spawn(self._catch_up(index, slot))

    async def _drain(self, index: int, slot: Slot, within_s: float) -> None:
        """It may die meanwhile."""
        asked = self.replay.ask(lambda replay: replay.server.drain_worker(index, within_s, "asked to leave"))
        drained, death = self.spawn(asked), self.spawn(slot.death())
        await asyncio.wait([drained, death], return_when=asyncio.FIRST_COMPLETED)
        if drained.done():
            drained.result()
            if slot.up.is_set():
                slot.process.die("it has left")
        drained.cancel()
        death.cancel()

    async def _look(self) -> None:
        """Workers that the replay server takes for lost are killed."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if self.replay.up.is_set():
                for index in self.replay.process.server.status()["lost_workers"]:
                    slot = self.workers[index]
                    if slot.up.is_set() and self.world.loop.time() - slot.since > JOIN_S:
                        slot.process.die("silent")

    def _survey(self) -> Checkpoint | None:
        """Where to resume: the newest whole checkpoint. Newer ones are set aside."""
        checkpoints = self.world.disk.checkpoints
        usable = sorted(checkpoints)
        if len(usable) > 1 and self.world.tears():
            usable.pop()
            if usable[-1] == 0:
                self.world.judge.forget()  # what a lost checkpoint covered is freed
        self.step = self.saved = usable[-1] if usable else 0
        for newer in [step for step in checkpoints if step > self.step]:
            del checkpoints[newer]
        return checkpoints.get(self.step)

    async def _go_back(self) -> None:
        """The learner is gone, and with it all that came after its last checkpoint."""
        self._give_up_evaluating()
        await asyncio.sleep(RESTART_S)
        checkpoint = self._survey()
        await self._bring_up(self.learner, partial(Learner, self.world, checkpoint, self.steps))
        self.branch = await self.replay.ask(lambda replay: replay.server.roll_back(self.step, "the learner died"))
        self.version = self.step
        await self._publish_again()

    # ----------------------------------------------------------------------------------------------------------- loop

    async def _train(self) -> None:
        if self.step == 0:
            await self._checkpoint()
        self.leasing = True
        await self.replay.ask(lambda replay: replay.server.begin())
        while self.step < self.steps:
            if self.step + 1 == self.steps and not self.plan.ends_wildly:
                self.world.settle()
            self.no_batch = await self.learner.call(lambda learner: learner.take_batch(self.step + 1))
            if self.no_batch:
                break
            await self._train_step(self.step + 1)
        if self.step == 0:
            raise RunError("no batch was ever full")
        await self._finish()

    async def _train_step(self, step: int) -> None:
        async with self.turn:
            summary = await self.learner.call(lambda learner: learner.train_step())
            self.version = step
        faults.point("after_train")
        both = [self.spawn(self._account(step, summary)), self.spawn(self._publish())]
        try:
            await asyncio.gather(*both)
        finally:
            for task in both:
                task.cancel()
        faults.point("after_publish")
        await self.replay.ask(lambda replay: replay.server.published(step))
        self.step = step
        if step % self.plan.checkpoint_every == 0:
            await self._checkpoint()
        if self.plan.evaluates and self.evaluating is None:
            self.evaluating = self.spawn(self._evaluate())

    async def _account(self, step: int, summary: dict[str, float]) -> None:
        metrics = await self.replay.ask(lambda replay: replay.server.trained(step, summary))
        self.world.judge.step_done(step, metrics)
        faults.point("after_trained")

    async def _checkpoint(self) -> None:
        await self.learner.call(lambda learner: learner.save(self.step))
        self.saved = self.step
        faults.point("after_checkpoint")
        oldest = min((step for step in self.world.disk.checkpoints if step > 0), default=0)
        await self.replay.ask(lambda replay: replay.server.covered(oldest))

    async def _finish(self) -> None:
        if self.saved < self.step:
            await self._checkpoint()
        self._give_up_evaluating()
        await self.replay.ask(lambda replay: replay.server.finish())
        self.leasing = False
        if self.plan.evaluates:
            await self._evaluate()

    def _give_up_evaluating(self) -> None:
        if self.evaluating:
            self.evaluating.cancel()
            self.evaluating = None

    async def _evaluate(self) -> None:
        prompts = [prompt_at(EVAL_ID + index) for index in range(3)]
        requests = [
            EvalRequest(
                request_id=self.world.new_request(), seed=1, sampling=Sampling(), prompts=prompts[first : first + 2]
            )
            for first in range(0, len(prompts), 2)
        ]
        answers = await self.replay.ask(lambda replay: replay.server.evaluate(requests))
        assert [answer.prompt_id for answer in answers] == [prompt.prompt_id for prompt in prompts]

    # -------------------------------------------------------------------------------------------------------- weights

    async def _publish_again(self) -> None:
        await self._publish()
        await self.replay.ask(lambda replay: replay.server.published(self.step))

    async def _publish(self) -> None:
        """To every worker that is up; those that die meanwhile catch up in their next life."""
        async with self.turn:
            for index, slot in enumerate(self.workers):
                if slot.up.is_set():
                    await self._send(index, slot)

    async def _catch_up(self, index: int, slot: Slot) -> None:
        async with self.turn:
            has = self.loaded.get(index, (slot.life, 0, 0))
            if has[0] != slot.life:
                has = (slot.life, 0, 0)
            if has[1:] != (self.branch, self.version) and self.learner.up.is_set():
                await self._send(index, slot, alone=True)

    async def _send(self, index: int, slot: Slot, *, alone: bool = False) -> None:
        try:
            version, number = await self.learner.call(lambda learner: learner.send_weights())
        except ProcessDied:
            if alone:  # all workers are sent to when it is back
                return
            raise
        await asyncio.sleep(TRANSFER_S)
        life = slot.life
        try:
            await slot.call(lambda rollout: rollout.worker.load_weights(version, {"number": number}, self.branch))
        except ProcessDied:
            return
        self.loaded[index] = (life, self.branch, version)
