"""The product's rollout worker in a process of its own, around an engine and a scorer of a few lines.

In: leases, weights. Out: groups whose tokens are the numbers of the weights that sampled them, so that whoever has the
lineage of the weights can tell which of them were undone. A curse makes a prompt kill its worker, hang, take long, or
break its group or its reward function.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from asyncdapo.errors import RewardError
from asyncdapo.messages import Prompt, Score
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import LoadTimes, Request, Sample, Sampled
from asyncdapo.rollout.episodes import SingleTurn
from asyncdapo.rollout.worker import RolloutWorker
from tests.simulation.plan import GROUP_SIZE
from tests.simulation.process import Killed, Process
from tests.simulation.replay import ROLLOUT_ADDRESS

if TYPE_CHECKING:
    from tests.simulation.world import World


class Engine:
    """Every running request samples a token each `token_s`; the token is the number of the weights that sampled it."""

    def __init__(self, world: World) -> None:
        self._world, self.num_slots = world, world.plan.num_slots
        self.num_outstanding = self.loaded_version = self.weights = 0
        self.stops_to_load = False
        self._num_running = self._num_tokens = 0
        self._running: list[tuple[Request, list[int], list[tuple[int, int]]]] = []
        """Tokens and versions so far, the same for all samples of a request."""
        self._freed = asyncio.Event()

    async def load_weights(self, version: int, weights: Mapping[str, int]) -> LoadTimes:
        self.loaded_version, self.weights = version, weights["number"]
        return LoadTimes(load_s=0.0)

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
        self._running.append((request, tokens, versions))
        try:
            await self._sample_tokens(request, num, max(1, num_tokens - request.num_begun), curse, tokens, versions)
        finally:
            self._running = [running for running in self._running if running[0] is not request]
        return tokens, versions

    async def so_far(self, request: Request) -> list[Sampled]:
        await asyncio.sleep(0.01)
        return [
            Sampled(
                token_ids=np.array(tokens, np.int32),
                logprobs=np.full(len(tokens), -0.5, np.float32),
                versions=list(versions),
            )
            for running, tokens, versions in self._running
            if running is request
            for _ in request.seeds
        ]

    async def _sample_tokens(
        self,
        request: Request,
        num: int,
        num_tokens: int,
        curse: str | None,
        tokens: list[int],
        versions: list[tuple[int, int]],
    ) -> None:
        plan = self._world.plan
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

    def gauges(self) -> dict[str, float]:
        return {"tokens": self._num_tokens}


class Rollout(Process):
    """The product's rollout worker around the engine above."""

    role = "rollout"

    def __init__(self, world: World, index: int) -> None:
        super().__init__(world, f"rollout-{index}")
        config = RolloutConfig(
            group_size=GROUP_SIZE, slots=world.plan.num_slots, save_partials_s=world.plan.save_partials_s
        )
        self.engine = Engine(world)
        self.worker: RolloutWorker = self.inside(
            RolloutWorker,
            index,
            config,
            world.plan.replay.heartbeat_s,
            self.engine,
            SingleTurn(self.engine, self._score),
            str,
            ROLLOUT_ADDRESS,
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
