"""A process of the learner: batch feed + learner, and in rank 0 the weight sender.

    task and thread of their own    ask for batch k + 1 ── receive ── prepare ┐ (`batches`)
    the thread for blocking work    train step k ─────────────────────────────┴ begin k + 1 ──────────── finish k + 1 ──
    the thread that reads weights                └ send version k ── copy the checkpoint ┐
    a thread of its own                                                                  └ write it (`storage`)

In: commands of the controller, batches of the replay server. Out: metrics, weights, checkpoints. While it trains it
waits for nobody, whatever is on its way; only `take_batch` waits for the batch.

A learner of one rank begins with batch k + 1 before it is told, as soon as it has the batch and version k
(`step_thread`). The command `train_step` allows it to go on to version k + 1. The controller gives it when nobody needs
version k any more, so whatever comes before (a send that is repeated, a checkpoint, a comparison, a request to stop)
finds the learner at version k. Several ranks wait for the command: the gathers of a send and those of a gradient have
to be in one order at all ranks.

Invariants: the weights change in `train_step` alone. The states of `learner.times` in the metrics of a step sum to the
wall time since the train step before ended, and in the first step of a life to that since its batch was wanted.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asyncdapo import faults
from asyncdapo.config.config import Config
from asyncdapo.controller.process.health import Health
from asyncdapo.controller.process.waits import NOBODY, Wait
from asyncdapo.controller.roles.base import ProcessBase, ProcessSpec, T
from asyncdapo.controller.roles.model_check import check_rotations
from asyncdapo.controller.roles.observer import StepObserver
from asyncdapo.errors import RunError, WeightsError
from asyncdapo.learner.batches.batches import Batches
from asyncdapo.learner.batches.feed import BatchFeed, check_folder
from asyncdapo.learner.batches.prepared import Prepared
from asyncdapo.learner.config import LearnerConfig
from asyncdapo.learner.model.model import device_of
from asyncdapo.learner.step.learner import Learner
from asyncdapo.learner.step.probe import Pair
from asyncdapo.learner.step.ranks import GradientGroup, Ranks
from asyncdapo.learner.step.step_thread import StepThread
from asyncdapo.learner.storage.checkpoint import (
    Piece,
    begin_checkpoint,
    commit_checkpoint,
    remove_old_checkpoints,
)
from asyncdapo.learner.storage.host_copy import HostCopy
from asyncdapo.shares import Batch, NoBatch
from asyncdapo.transport.backend import Backend
from asyncdapo.transport.payload import Payload
from asyncdapo.transport.shared_memory import device_name
from asyncdapo.weights.group import WeightGroup
from asyncdapo.weights.manifest import Manifest
from asyncdapo.weights.sender import SendReport, WeightSender
from asyncdapo.weights.shards import Giver, Shards

log = logging.getLogger("weights")

BUSY_CPU_S = 10.0
WRITTEN_BLOCKS = 16_384
"""Steps in which a learner's CPU time and its blocks written (8 MiB) count as progress; an idle process makes none."""


class LearnerProcess(ProcessBase):
    """One rank of the learner: its share of a batch in, its shard of one version out.

    Ranks join before they load the model, which they divide among them: `host_ranks`, `join_ranks`, `load`."""

    def __init__(self, spec: ProcessSpec, feed: BatchFeed) -> None:
        super().__init__(spec)
        config = self.config.learner
        self.ranks = Ranks(spec.index, config.ranks, config.num_shards)
        self.rank_group: GradientGroup | None = None
        """Of the ranks; None before they join, and where there is only one."""
        self._learner: Learner | None = None
        """None until it is loaded."""
        self.steps: StepThread | None = None
        """Of the learner."""
        self.beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{spec.name} prepares")
        self.batches = Batches(feed, self._prepare)
        self.prepared: Prepared | None = None
        """The batch taken, until it is trained on."""
        self.reader = (
            ThreadPoolExecutor(1, f"{spec.name} reads weights", partial(_begin_reading, config))
            if self.ranks.num_ranks == 1
            else self.thread
        )
        """For blocking work that reads the weights and changes nothing."""
        self.weight_group: WeightGroup | None = None
        """The newest that this rank has hosted."""
        self.sender: WeightSender | None = None
        """None until the workers have joined the first group."""
        self.giver: Giver | None = None
        """None until this rank has given its shards for the first time."""
        self.num_sent = 0
        self.copied: HostCopy | None = None
        """What is to be written of a checkpoint."""
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{spec.name} writes")
        self.observer = StepObserver(self)

    @classmethod
    async def start(cls, spec: ProcessSpec, replay_address: str) -> LearnerProcess:
        """Connect to the replay server. Raises ConfigError where this node doesn't see what it writes."""
        torch.set_num_threads(spec.config.learner.threads)
        run_dir = Path(spec.config.run.dir)
        check_folder(run_dir, spec.name)
        return cls(spec, BatchFeed(replay_address, run_dir, spec.index, curve=spec.keys.client))

    @property
    def learner(self) -> Learner:
        if self._learner is None:
            raise RunError("it has no model yet")
        return self._learner

    async def serve(self) -> None:
        """Lasts as long as the process: everything that it does is a command of the controller."""
        await asyncio.Event().wait()

    async def health(self) -> Health:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Health(
            entries=[self.spec.entry()],
            waits=self.waits.open() or self._idle(),
            progress={
                "version": self._learner.version if self._learner else -1,
                "sent": self.num_sent,
                "cpu": usage.ru_utime // BUSY_CPU_S,  # a long step or a large checkpoint moves no other counter
                "written": usage.ru_oublock // WRITTEN_BLOCKS,
            },
        )

    def _idle(self) -> list[Wait]:
        """Rank 0 sends weights and writes checkpoints while the others wait for the next batch."""
        return [Wait(who=self.spec.name, whom="controller", what="a command")] if self.spec.index else []

    async def device(self) -> str:
        return device_name(device_of(self.config.learner))

    # ------------------------------------------------------------------------------------------------------- ranks

    async def host_ranks(self, backend: Backend) -> str:
        """Open the store of the group in which the ranks sum. Returns its address."""
        timeout_s = self.config.weights.timeout_s
        self.rank_group = GradientGroup.create_master(self.spec.host(), self.ranks.num_ranks, backend, timeout_s)
        return self.rank_group.address

    async def join_ranks(self, address: str, backend: Backend) -> None:
        """Join the group at `address`; rank 0 waits for the others."""
        with self.waits.on("learner", "the group of the ranks", self.config.weights.timeout_s):
            await self.blocking(self._join_ranks, address, backend)

    def _join_ranks(self, address: str, backend: Backend) -> None:
        rank, num_ranks, timeout_s = self.spec.index, self.ranks.num_ranks, self.config.weights.timeout_s
        if self.rank_group:
            self.rank_group.connect()
        else:
            self.rank_group = GradientGroup.join(address, rank, num_ranks, backend, timeout_s)
        self.ranks.join(self.rank_group)

    async def load(self, checkpoint: Path | None) -> None:
        """Load the model, and resume from the checkpoint if there is one. Every rank has to be told. Raises RunError
        when replicas have other weights than each other."""
        with self.waits.on(NOBODY, "loads the model"):
            self._learner = await self.blocking(load_learner, self.config, self.ranks, checkpoint)
        self.steps = StepThread(self.learner, self.thread, self.observer.on)

    # ----------------------------------------------------------------------------------------------------- weights

    async def host_weights(self, world_size: int, backend: Backend) -> tuple[str, Manifest]:
        """Open the store of a new process group. Returns its address, and what will be sent."""
        await self.abandon_workers()
        host, timeout_s = self.spec.host(), self.config.weights.timeout_s
        self.weight_group = WeightGroup.create_master(host, world_size, backend, timeout_s, self.learner.device)
        return self.weight_group.address, self._manifest()

    def _manifest(self) -> Manifest:
        """What is sent."""
        return Manifest.of(self.learner.shards(), getattr(torch, self.config.rollout.dtype))

    async def abandon_workers(self) -> None:
        """Leave the group. Who waits in it for a worker that has died fails now, not at the deadline.

        Beside the thread that sends, which may be waiting in this very group. NCCL's abort waits for the GPU,
        and the health must not."""
        if self.weight_group:
            await asyncio.to_thread(self.weight_group.close)

    async def accept_workers(self) -> None:
        """Wait for every worker to join."""
        assert self.weight_group is not None, "`host_weights` comes first"
        with self.waits.on("rollout", "the weight group", self.config.weights.timeout_s):
            self.sender = await self._reading(self._connect, self.weight_group)

    def _connect(self, group: WeightGroup) -> WeightSender:
        """In the thread that sends: on a GPU the buckets are of its stream, in which they are cleared and filled."""
        group.connect()
        shards, bucket_bytes = Shards(self.learner.shards()), self.config.weights.bucket_mb << 20
        return WeightSender(group, self._manifest(), bucket_bytes, shards)

    async def send_weights(self, version: int, branch: int) -> dict[str, float]:
        """Broadcast the weights as those of `version`; over when every worker has checked them. The ranks that have
        the other shards of them are told to `give_shards`."""
        assert self.sender is not None, "`accept_workers` comes first"
        faults.point("in_send_weights")
        with self.waits.on("rollout", f"version {version} to arrive", self.config.weights.timeout_s):
            report = await self._reading(self._in, "publish", partial(self._send, self.sender, version, branch))
        self.num_sent += 1
        log.info("version %d: %.1f MiB sent in %.3f s", version, report.num_bytes / 2**20, report.seconds)
        return {"bytes": report.num_bytes, "seconds": report.seconds, "gather_s": report.gather_s}

    def _send(self, sender: WeightSender, version: int, branch: int) -> SendReport:
        with self.ranks.together("gather weights", in_step_after=WeightsError):
            if version != self.learner.version:
                raise WeightsError(f"version {version} was to be sent, the learner has {self.learner.version}")
            return sender.send(version, self.learner.shards(), branch=branch)

    async def give_shards(self) -> dict[str, float]:
        """Take part while rank 0 gathers the weights that it sends, bucket by bucket."""
        faults.point("in_give_shards")
        began_s = time.monotonic()
        with self.waits.on("learner", "the weights to be gathered", self.config.weights.timeout_s):
            await self._reading(self._in, "publish", self._give)
        return {"seconds": time.monotonic() - began_s}

    def _give(self) -> None:
        shards, bucket_bytes = self.learner.shards(), self.config.weights.bucket_mb << 20
        self.giver = self.giver or Giver(Shards(shards), self._manifest(), bucket_bytes)
        with self.ranks.together("gather weights"):
            self.giver.give(shards, self.config.weights.timeout_s)

    # ------------------------------------------------------------------------------------------------------- steps

    async def take_batch(self, step: int) -> str:
        """Wait for batch `step` and keep it for `train_step`. Returns why there is none, once the data is used up."""
        times = self.learner.times
        times.begin()
        with times.on("wait"), self.waits.on("replay", f"batch {step}"):
            preparing = await self.batches.receive(step)
        if isinstance(preparing, NoBatch):
            return preparing.reason
        with times.on("prepare"), self.waits.on(NOBODY, f"reads and prepares batch {step}"):
            self.prepared = await preparing
        return ""

    async def _prepare(self, batch: Batch, payloads: Sequence[Payload]) -> Prepared:
        return await asyncio.get_running_loop().run_in_executor(self.beside, self.learner.prepare, batch, payloads)

    async def train_step(self) -> dict[str, float]:
        """Train on the batch taken, and bring the next one meanwhile. Returns the learner's metrics."""
        assert self.steps is not None, "`load` comes first"
        assert self.prepared is not None, "`take_batch` comes first"
        faults.point("before_train")
        step, coming = self.prepared.batch.step, None
        if step < self.config.run.steps:
            self.batches.ask(step + 1)
            if self.ranks.num_ranks == 1:
                coming = self.batches.ahead(step + 1)
        with self.waits.on(NOBODY, f"trains step {step}"):
            metrics = await self.steps.train(self.prepared, coming)
        self.prepared = None  # the next one may be here: two batches are what there is memory for
        faults.point("after_train")
        self.observer.write_spans(self.learner.times)
        return metrics

    async def probe(self, version: int, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """What the weights of `version` make of what the engines have sampled with it: see `Learner.logprobs`. Every
        rank has to be told."""
        with self.waits.on(NOBODY, f"computes log-probs of version {version}"):
            return await self.blocking(self.learner.logprobs, version, pairs)

    async def check_ranks(self) -> None:
        """Raises RunError unless every rank has the same weights."""
        with self.waits.on(NOBODY, "compares its weights with the other ranks'"):
            await self._reading(self._in, "checkpoint", self.learner.check_ranks)

    async def copy_checkpoint(self, step: int) -> int:
        """Keep what this rank writes of the checkpoint of `step`, in host memory. Every rank has to be told; training
        may continue when all have answered. Returns its bytes."""
        with self.waits.on(NOBODY, f"copies the checkpoint of step {step}"):
            copied = self.copied = await self._reading(self._in, "checkpoint", partial(self._copy, step))
        return copied.num_bytes

    def _copy(self, step: int) -> HostCopy:
        if self.spec.index == 0:
            begin_checkpoint(Path(self.config.run.dir), step)
        return self.learner.copy()

    async def write_checkpoint(self, step: int) -> list[Piece]:
        """Write this rank's part of it, beside the training. Returns what was written."""
        assert self.copied is not None, "`copy_checkpoint` comes first"
        copied, self.copied = self.copied, None
        with self.waits.on(NOBODY, f"writes the checkpoint of step {step}"):
            return await asyncio.get_running_loop().run_in_executor(
                self.writer, copied.write, Path(self.config.run.dir), step
            )

    async def commit_checkpoint(self, step: int, branch: int, counters: dict[str, int], pieces: list[Piece]) -> None:
        """Rank 0, once all ranks have written: the checkpoint is whole. Removes those past `keep_checkpoints`."""
        with self.waits.on(NOBODY, f"completes the checkpoint of step {step}"):
            await asyncio.get_running_loop().run_in_executor(self.writer, self._commit, step, branch, counters, pieces)
        faults.point("after_checkpoint")

    def _commit(self, step: int, branch: int, counters: dict[str, int], pieces: list[Piece]) -> None:
        run_dir, ranks = Path(self.config.run.dir), self.ranks
        world = {"num_ranks": ranks.num_ranks, "num_shards": ranks.num_shards}
        commit_checkpoint(run_dir, step, branch, pieces, **world, counters=counters)
        remove_old_checkpoints(run_dir, self.config.learner.keep_checkpoints)

    def _in(self, state: str, work: Callable[[], T]) -> T:
        """Do blocking work that reads the weights. Its time belongs to `state` where it isn't beside a gradient."""
        with self.learner.in_use, self.learner.times.on(state, beside=True):
            return work()

    async def _reading(self, work: Callable[..., T], *args: Any) -> T:
        """Run blocking work that reads the weights and changes nothing, in the one thread for it."""
        return await asyncio.get_running_loop().run_in_executor(self.reader, work, *args)


def _begin_reading(config: LearnerConfig) -> None:
    """What the thread that reads weights is like: on a GPU its copies don't queue behind the kernels of a gradient."""
    torch.set_num_threads(config.threads)
    if (device := device_of(config)).type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device, priority=-1))


def load_learner(config: Config, ranks: Ranks, checkpoint: Path | None) -> Learner:
    """The model and its optimizer, as the checkpoint has them if there is one; blocks. Raises ConfigError for a model
    that can't be trained."""
    learner = Learner(
        config.model,
        config.loss,
        config.learner,
        temperature=config.rollout.temperature,
        staleness_bound=config.replay.staleness_bound,
        max_response_length=config.rollout.max_response_length,
        num_steps=config.run.steps,
        seed=config.run.seed,
        ranks=ranks,
    )
    check_rotations(config)  # once more: it may be a model that was downloaded
    if checkpoint:
        learner.restore(checkpoint)
    learner.check_ranks()
    if learner.device.type == "cuda":
        torch.cuda.synchronize(learner.device)  # the thread that sends reads the weights in a stream of its own
    return learner
