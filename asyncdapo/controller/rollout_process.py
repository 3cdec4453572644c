"""A rollout process: engine + scorer + rollout worker + weight receiver."""

from __future__ import annotations

import time
from functools import partial

from asyncdapo.controller.member import Member
from asyncdapo.controller.pulse import Pulse
from asyncdapo.controller.roster import entry_of
from asyncdapo.controller.waits import NOBODY
from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.scorer import Scorer
from asyncdapo.rollout.torch_engine.engine import TorchEngine
from asyncdapo.rollout.worker import RolloutWorker
from asyncdapo.tokens import load_tokenizer
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.process_group import device_name
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.layout import Manifest
from asyncdapo.weights.receiver import WeightReceiver


class Main(Member):
    """One worker: an engine that never idles while credit is left, a scorer, and a receiver of weights."""

    role = "rollout"

    group: WeightGroup | None = None

    async def start(self, replay_address: str) -> None:
        """Load the model (the only time a weight file is opened), start the verifiers, and connect to the replay
        server."""
        config = self.config
        self.engine = TorchEngine(config.model.path, config.rollout, max_prompt_length=config.prompts.max_prompt_length)
        await self.engine.start()
        reward = config.reward
        pool = ScorerPool(
            reward.verifier,
            reward.processes,
            reward.timeout_s,
            concurrency=reward.concurrency,
            retries=reward.retries,
        )
        decode = load_tokenizer(config.model.path).decode
        self.scorer = Scorer(
            reward,
            pool,
            decode,
            config.rollout.max_response_length,
            filter_metric=config.filter.metric if config.filter.enabled else None,
        )
        await self.scorer.start()
        self.worker = RolloutWorker(
            self.index,
            config.rollout,
            config.replay.heartbeat_s,
            self.engine,
            self.scorer,
            replay_address,
            curve=self.keys.client,
            overlong_filter=reward.overlong_filter,
        )
        self.num_received = 0

    async def serve(self) -> None:
        """Generate and score; raises what ends the worker."""
        await self.worker.run()

    async def pulse(self) -> Pulse:
        gauges = self.worker.gauges()
        if num_running := self.engine.num_outstanding:
            self.waits.stand(
                NOBODY, f"{num_running} sequences run or wait for a slot, {gauges['tokens']:.0f} tokens so far"
            )
        elif num_running := self.worker.num_running:
            self.waits.stand(NOBODY, f"the verifier judges {num_running} groups")
        else:
            self.waits.stand("replay", "a lease")
        first = self.index * self.config.reward.processes
        scorers = [entry_of("scorer", first + place, pid) for place, pid in enumerate(self.scorer.pids())]
        return Pulse(
            entries=[await self.entry(), *scorers],
            waits=self.waits.open(),
            progress={
                "tokens": gauges["tokens"],
                "judged": self.scorer.num_judged,
                "received": self.num_received,
            },
        )

    async def device(self) -> str:
        return device_name(self.engine.device)

    async def join_weights(
        self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest
    ) -> None:
        """Join the process group in which the learner sends; leave the one before."""
        with self.waits.on("learner", "the weight group", self.config.weights.timeout_s):
            await self.blocking(self._join, address, rank, world_size, backend, manifest)

    def _join(self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest) -> None:
        if self.group:
            self.group.close()
        self.group = WeightGroup.join(address, rank, world_size, backend, self.config.weights.timeout_s)
        self.receiver = WeightReceiver(self.group, manifest, self.engine.device)

    async def receive_weights(self, version: int, branch: int) -> dict[str, float]:
        """Receive while generating, then generate with the new weights from the next token on."""
        began = time.monotonic()
        with self.waits.on("learner", f"the weights of version {version}", self.config.weights.timeout_s):
            weights = await self.blocking(partial(self.receiver.receive, version, branch=branch))
        received = time.monotonic()
        await self.worker.load_weights(version, weights, branch)
        self.num_received += 1
        return {"receive_s": received - began, "load_s": time.monotonic() - received}
