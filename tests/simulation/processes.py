"""Processes that can be killed at any step: the product's own replay server, rollout worker and batch feed, each with
the smallest possible engine, scorer or learner.

In: a world that they live in. Out: nothing but messages, rows and checkpoints: what a process has in memory is gone
with it. A killed process sends and writes nothing from that moment on, not even while its tasks unwind.
Does not own: who is started when (`controller`), what is right (`judge`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import ContextVar, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncdapo import faults
from asyncdapo.errors import RewardError, RunError
from asyncdapo.learner.feed import BatchFeed
from asyncdapo.messages import NoBatch, Prompt, Score
from asyncdapo.replay.journal import Journal
from asyncdapo.replay.server import ReplayServer
from asyncdapo.replay.state import ReplayState
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Request, Sample
from asyncdapo.rollout.worker import RolloutWorker
from tests.replay.restarts import snapshot
from tests.simulation.disk import Checkpoint
from tests.simulation.plan import EVAL_ID, GROUP_SIZE

if TYPE_CHECKING:
    from tests.simulation.world import World

ROLLOUT_ADDRESS, LEARNER_ADDRESS = "tcp://replay:1", "tcp://replay:2"
NUM_KEPT = 2
"""Checkpoints kept beside that of step 0."""


class Killed(BaseException):
    """The process is dead; nothing may catch this."""

    def __init__(self, point: str = "") -> None:
        self.point = point


class ProcessDied(Exception):  # noqa: N818 - named as the product's own
    """Whoever called it gets no answer."""


class Process:
    """One life."""

    role: str

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.alive = world, name, True
        self.sockets: list = []
        self.dead: asyncio.Future[None] = world.loop.create_future()
        self.on_death: Callable[[], None] = lambda: None
        self._tasks: set[asyncio.Task] = set()
        self._answers: set[asyncio.Future] = set()
        self._context = copy_context()
        self._context.run(CURRENT.set, self)

    def inside(self, make: Any, *args: Any, **options: Any) -> Any:
        """Call as this process."""
        return self._context.run(partial(make, *args, **options))

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task:
        """A task of this process; if it is killed there, all of it is."""
        task = self.world.loop.create_task(work, context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    async def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What the process answers. Raises ProcessDied when it dies before it does."""
        if not self.alive:
            work.close()
            raise ProcessDied(self.name)
        answer = self.world.loop.create_future()
        self._answers.add(answer)
        self.spawn(work).add_done_callback(partial(self._answer, answer))
        try:
            return await answer
        finally:
            self._answers.discard(answer)

    def _answer(self, answer: asyncio.Future, task: asyncio.Task) -> None:
        if answer.done() or task.cancelled():
            return
        if error := task.exception():
            answer.set_exception(ProcessDied(self.name) if isinstance(error, Killed) else error)
        else:
            answer.set_result(task.result())

    def _note_end(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Killed):
            self.die(error.point)
        elif error is not None and not isinstance(error, RunError | ProcessDied):
            self.world.crash(error)

    def die(self, why: str) -> None:
        """As by SIGKILL."""
        if not self.alive:
            return
        self.alive = False
        self.world.note(f"{self.role} deaths", f"{self.name} dies: {why}")
        self.world.note(f"{self.role} {why}", "")
        for socket in self.sockets:
            socket.close()
        for task in self._tasks:
            task.cancel()
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(ProcessDied(self.name))
        self.on_death()
        self.dead.set_result(None)


CURRENT: ContextVar[Process] = ContextVar("process")


# --------------------------------------------------------------------------------------------------------- replay server


class WatchedJournal(Journal):
    """The product's, which tells the judge what was committed, and which a dead process can't write."""

    def write(self, event: Any, actions: Any, **extras: Any) -> None:
        process = CURRENT.get()
        if not process.alive:
            raise Killed("writes after its death")
        process.in_event = True
        try:
            super().write(event, actions, **extras)
        except Killed as killed:
            if killed.point == "after_commit":
                process.committed(event, actions)
            raise
        process.committed(event, actions)

    def roll_back(self, step: int, reason: str, config: Any) -> None:
        process = CURRENT.get()
        super().roll_back(step, reason, config)
        process.world.judge.rolled_back(step, self.branch)


class Replay(Process):
    """The product's replay server between simulated sockets."""

    role = "replay"

    def __init__(self, world: World, roll_back_to: int | None) -> None:
        super().__init__(world, "replay")
        self.in_event = False
        self.server: ReplayServer = self.inside(self._open, roll_back_to)
        if roll_back_to is None:
            world.judge.reloaded(self.server._exchange.state)
        self.serving = self.spawn(self.server.run())
        self.serving.add_done_callback(self._note_failure)

    def _open(self, roll_back_to: int | None) -> ReplayServer:
        world, plan = self.world, self.world.plan
        self.journal = world.disk.open_journal(WatchedJournal)
        try:
            if roll_back_to is not None:
                self.journal.roll_back(roll_back_to, "resumed", plan.replay)
            return ReplayServer(
                plan.replay,
                self._make_state,
                self.journal,
                prompt_at,
                group_size=GROUP_SIZE,
                seed=plan.seed,
                total_slots=plan.num_workers * plan.num_slots,
                ports=(1, 2),
            )
        except Killed:
            self.die("while it was opened")
            raise

    def _make_state(self, recovered: Any) -> ReplayState:
        plan = self.world.plan
        return ReplayState(
            plan.replay,
            plan.filter,
            max_attempts=plan.max_attempts,
            num_prompts=plan.num_prompts,
            recovered=recovered,
        )

    def _note_failure(self, task: asyncio.Task) -> None:
        if self.alive and not task.cancelled() and task.exception():
            self.world.fail(task.exception())

    def committed(self, event: Any, actions: Any) -> None:
        self.in_event = False
        self.world.judge.observe(event, actions)

    def die(self, why: str) -> None:
        if self.alive and hasattr(self, "server"):
            state = None if self.in_event else snapshot(self.server._exchange.state)
            self.world.judge.died(state)
        super().die(why)
        self.journal.close()


def prompt_at(prompt_id: int) -> Prompt:
    return Prompt(prompt_id=prompt_id, epoch=0, source="test", row=prompt_id, token_ids=[prompt_id], answer="")


# -------------------------------------------------------------------------------------------------------- rollout worker


class Engine:
    """Every running request samples a token each `token_s`; the token is the number of the weights that sampled it."""

    def __init__(self, world: World) -> None:
        self._world, self.num_slots = world, world.plan.num_slots
        self.num_outstanding = self.loaded_version = self.weights = 0
        self._num_running = self._num_tokens = 0
        self._freed = asyncio.Event()

    async def load_weights(self, version: int, weights: Mapping[str, int]) -> None:
        self.loaded_version, self.weights = version, weights["number"]

    async def generate(self, request: Request) -> list[Sample]:
        num = len(request.seeds)
        self._world.judge.engine_takes(self.num_outstanding, num, self.num_slots)
        self.num_outstanding += num
        try:
            while self._num_running and self._num_running + num > self.num_slots:
                await self._freed.wait()
            self._num_running += num
            try:
                request.num_running = num
                tokens, versions = await self._sample(request, num)
            finally:
                self._num_running -= num
                request.num_running = 0
        finally:
            self.num_outstanding -= num
            self._freed.set()
            self._freed.clear()
            request.on_sample_done()
        sample = Sample(
            token_ids=np.array(tokens, np.int32),
            logprobs=np.full(len(tokens), -0.5, np.float32),
            versions=versions,
            finish_reason="stop",
        )
        return [sample] * num

    async def _sample(self, request: Request, num: int) -> tuple[list[int], list[tuple[int, int]]]:
        prompt_id, plan = request.prompt_ids[0], self._world.plan
        curse = self._world.curse(prompt_id, "kills", "hangs", "slow")
        tokens: list[int] = []
        versions: list[tuple[int, int]] = []
        num_tokens = plan.num_tokens(prompt_id, self.weights) + (12 if curse == "slow" else 0)
        for index in range(num_tokens):
            if curse == "hangs":
                await self._world.loop.create_future()
            await asyncio.sleep(plan.token_s)
            if curse == "kills":
                raise Killed("poison")
            tokens.append(self.weights)
            if versions and versions[-1][0] == self.loaded_version:
                versions[-1] = (self.loaded_version, versions[-1][1] + 1)
            else:
                versions.append((self.loaded_version, 1))
            request.num_sampled += num
            self._num_tokens += num
            if index == 0 and request.on_started:
                request.on_started(self.loaded_version)
        return tokens, versions

    def gauges(self) -> dict[str, float]:
        return {"tokens": self._num_tokens}


class Rollout(Process):
    """The product's rollout worker around the engine above."""

    role = "rollout"

    def __init__(self, world: World, index: int) -> None:
        super().__init__(world, f"rollout-{index}")
        config = RolloutConfig(group_size=GROUP_SIZE, slots=world.plan.num_slots)
        self.engine = Engine(world)
        self.worker: RolloutWorker = self.inside(
            RolloutWorker, index, config, world.plan.replay.heartbeat_s, self.engine, self._score, ROLLOUT_ADDRESS
        )
        self.spawn(self.worker.run()).add_done_callback(self._note_failure)

    def _note_failure(self, task: asyncio.Task) -> None:
        """Whatever ends a worker, it is started again."""
        if self.alive and not task.cancelled():
            self.die(str(task.exception()))

    async def _score(
        self, prompt: Prompt, token_ids: Sequence[np.ndarray], finish_reasons: Sequence[str], seed: int
    ) -> list[Score]:
        world = self.world
        match world.curse(prompt.prompt_id, "raises", "breaks"):
            case "raises":
                raise RewardError("this prompt has a bad row")
            case "breaks":
                return [Score(reward=math.nan, metrics={"acc": 0.0})] * len(token_ids)
        constant = world.plan.draws_constant(prompt.prompt_id, int(token_ids[0][0]))
        accs = [float(index % 2 and not constant) for index in range(len(token_ids))]
        return [Score(reward=acc, metrics={"acc": acc}) for acc in accs]


# --------------------------------------------------------------------------------------------------------------- learner


class Learner(Process):
    """Counts its weights instead of training them, and remembers what it trained on."""

    role = "learner"

    def __init__(self, world: World, checkpoint: Checkpoint | None) -> None:
        super().__init__(world, "learner")
        self.lineage = list(checkpoint.lineage) if checkpoint else [0]
        """Number of the weights of each version, the initial ones first; no two are ever the same."""
        self.trained = dict(checkpoint.trained) if checkpoint else {}
        """(prompt_id, group_id) of the groups of each batch."""
        self._feed: BatchFeed = self.inside(BatchFeed, LEARNER_ADDRESS)

    async def take_batch(self, step: int) -> str:
        """Returns why there is none, once the data is used up."""
        answer = await self._feed.take(step)
        if isinstance(answer, NoBatch):
            return answer.reason
        self._batch, payload = answer
        self.world.judge.batch_arrived(self, self._batch, payload)
        return ""

    async def train_step(self) -> dict[str, float]:
        faults.point("before_train")
        await asyncio.sleep(self.world.plan.train_s)
        step = self._batch.step
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


def held_out(num: int) -> list[Prompt]:
    return [prompt_at(EVAL_ID + index) for index in range(num)]
