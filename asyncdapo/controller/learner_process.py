"""A process of the learner: batch feed + learner, and in rank 0 the weight sender."""

from __future__ import annotations

import asyncio
import logging
import resource
from functools import partial
from pathlib import Path

import numpy as np
import torch

from asyncdapo import faults
from asyncdapo.controller.member import Member
from asyncdapo.controller.pulse import Pulse
from asyncdapo.controller.waits import NOBODY, Wait
from asyncdapo.learner.feed import BatchFeed
from asyncdapo.learner.group import GradientGroup, Ranks
from asyncdapo.learner.learner import Learner
from asyncdapo.learner.probe import Pair
from asyncdapo.messages import NoBatch
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.process_group import device_name
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.layout import Manifest
from asyncdapo.weights.sender import WeightSender

log = logging.getLogger("weights")

BUSY_CPU_S = 10.0
WRITTEN_BLOCKS = 16_384
"""Steps in which a learner's CPU time and its blocks written (8 MiB) count as progress; an idle process makes none."""


class Main(Member):
    """One rank of the learner: its share of a batch in, one version out, the same at every rank."""

    role = "learner"

    group: WeightGroup | None = None
    rank_group: GradientGroup | None = None

    async def start(self, replay_address: str, checkpoint: Path | None) -> None:
        """Load the model, go on from the checkpoint if there is one, and connect to the replay server."""
        config = self.config
        torch.set_num_threads(config.learner.threads)
        self.ranks = Ranks(self.index, config.learner.ranks)
        self.learner = await self.blocking(self._load, checkpoint)
        self.feed = BatchFeed(
            replay_address, self.index, config.learner.ranks, config.learner.updates_per_step, curve=self.keys.client
        )
        self.num_sent = 0
        self.stopped = asyncio.Event()

    def _load(self, checkpoint: Path | None) -> Learner:
        config = self.config
        learner = Learner(
            config.model,
            config.loss,
            config.learner,
            temperature=config.rollout.temperature,
            staleness_bound=config.replay.staleness_bound,
            max_response_length=config.rollout.max_response_length,
            seed=config.run.seed,
            ranks=self.ranks,
        )
        if checkpoint:
            learner.restore(checkpoint)
        return learner

    async def serve(self) -> None:
        """Lasts as long as the process."""
        await self.stopped.wait()

    async def pulse(self) -> Pulse:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Pulse(
            entries=[await self.entry()],
            waits=self.waits.open() or self._idle(),
            progress={
                "version": self.learner.version,
                "sent": self.num_sent,
                "cpu": usage.ru_utime // BUSY_CPU_S,  # a long step or a large checkpoint moves no other counter
                "written": usage.ru_oublock // WRITTEN_BLOCKS,
            },
        )

    def _idle(self) -> list[Wait]:
        """Rank 0 sends weights and writes checkpoints while the others wait for the next batch."""
        return [Wait(who=self.name, whom="controller", what="a command")] if self.index else []

    async def device(self) -> str:
        return device_name(self.learner.device)

    # ------------------------------------------------------------------------------------------------------- ranks

    async def host_ranks(self, backend: Backend) -> str:
        """Open the store of the group in which the ranks sum. Returns its address."""
        timeout_s = self.config.weights.timeout_s
        self.rank_group = GradientGroup.create_master(self.host(), self.ranks.num_ranks, backend, timeout_s)
        return self.rank_group.address

    async def join_ranks(self, address: str, backend: Backend) -> None:
        """Join the group at `address`; rank 0 waits for the others. Raises RunError when the ranks' weights differ."""
        with self.waits.on("learner", "the group of the ranks", self.config.weights.timeout_s):
            await self.blocking(self._join_ranks, address, backend)

    def _join_ranks(self, address: str, backend: Backend) -> None:
        rank, num_ranks, timeout_s = self.index, self.ranks.num_ranks, self.config.weights.timeout_s
        digest = self.learner.digest()  # before the others wait for it
        if self.rank_group:
            self.rank_group.connect()
        else:
            self.rank_group = GradientGroup.join(address, rank, num_ranks, backend, timeout_s)
        self.ranks.join(self.rank_group)
        self.ranks.check_same(digest, "weights")

    # ----------------------------------------------------------------------------------------------------- weights

    async def devices(self) -> list[str]:
        """The device of the one rank that the learner has in the weight group."""
        return [await self.device()]

    async def host_weights(self, world_size: int, backend: Backend) -> tuple[str, Manifest]:
        """Open the store of a new process group. Returns its address, and what will be sent."""
        if self.group:
            self.group.close()
        timeout_s = self.config.weights.timeout_s
        self.group = WeightGroup.create_master(self.host(), world_size, backend, timeout_s, self.learner.device)
        self.manifest = Manifest.of(self.learner.weights(), getattr(torch, self.config.rollout.dtype))
        return self.group.address, self.manifest

    async def abandon_workers(self) -> None:
        """One of them has died: whoever waits for it to join fails now, not at the deadline."""
        if self.group:
            self.group.close()

    async def accept_workers(self) -> None:
        """Wait for every worker to join."""
        with self.waits.on("rollout", "the weight group", self.config.weights.timeout_s):
            await self.blocking(self.group.connect)
        self.sender = WeightSender(self.group, self.manifest, self.config.weights.bucket_mb << 20)

    async def send_weights(self, version: int, branch: int) -> dict[str, float]:
        """Broadcast the weights as those of `version`; over when every worker has checked them."""
        faults.point("in_send_weights")
        with self.waits.on("rollout", f"version {version} to arrive", self.config.weights.timeout_s):
            send = partial(self.sender.send, version, self.learner.weights(), branch=branch)
            report = await self.blocking(send)
        self.num_sent += 1
        log.info("version %d: %.1f MiB sent in %.3f s", version, report.num_bytes / 2**20, report.seconds)
        return {"bytes": report.num_bytes, "seconds": report.seconds}

    # ------------------------------------------------------------------------------------------------------- steps

    async def take_batch(self, step: int) -> str:
        """Wait for batch `step` and keep it for `train_step`. Returns why there is none, once the data is used up."""
        with self.waits.on("replay", f"batch {step}"):
            taken = await self.feed.take(step)
        if isinstance(taken, NoBatch):
            return taken.reason
        self.batch, self.payload = taken
        return ""

    async def train_step(self) -> dict[str, float]:
        """Train on the batch taken. Returns the learner's metrics."""
        faults.point("before_train")
        with self.waits.on(NOBODY, f"trains step {self.batch.step}"):
            metrics = await self.blocking(self.learner.train, self.batch, self.payload)
        faults.point("after_train")
        return metrics

    async def probe(self, version: int, pairs: list[Pair]) -> list[np.ndarray]:
        """What the weights of `version` make of what the engines have sampled with it: see `Learner.logprobs`."""
        with self.waits.on(NOBODY, f"computes log-probs of version {version}"):
            return await self.blocking(self.learner.logprobs, version, pairs)

    async def save(self, step: int, branch: int, counters: dict[str, int]) -> None:
        """Write the checkpoint of `step`."""
        with self.waits.on(NOBODY, f"writes the checkpoint of step {step}"):
            await self.blocking(self.learner.save, Path(self.config.run.dir), step, branch, counters)
        faults.point("after_checkpoint")
