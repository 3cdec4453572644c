"""The processes of a run, each put together from its stages: the only place where the stages of one process meet.

    ReplayActor   prompt stream + replay server (core, journal, sockets)
    RolloutActor  engine + scorer + rollout worker + weight receiver
    LearnerActor  batch feed + learner + weight sender

Each is a Ray async actor: commands are short Ray calls, `serve` lasts as long as the process, and whatever raises in it
reaches the controller as that call's result. Rollouts travel by ZeroMQ and weights by a process group of their own; a
Ray call carries neither. Blocking work (a train step, a broadcast) runs in a thread of its own, so that every actor
answers while it computes.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch

from asyncdapo import faults
from asyncdapo.config import Config
from asyncdapo.controller.pulse import Pulse
from asyncdapo.controller.roster import Entry, entry_of, this_process
from asyncdapo.controller.stacks import install as install_stacks
from asyncdapo.controller.stacks import stacks
from asyncdapo.controller.waits import NOBODY, Waits, replay_wait
from asyncdapo.learner.feed import BatchFeed
from asyncdapo.learner.learner import Learner
from asyncdapo.messages import EvalAnswer, EvalRequest, NoBatch, Prompt
from asyncdapo.prompts.registry import open_task
from asyncdapo.prompts.stream import PromptStream
from asyncdapo.replay.journal import Journal
from asyncdapo.replay.recovery import Recovered
from asyncdapo.replay.server import ReplayServer
from asyncdapo.replay.sessions import LOST_TICKS
from asyncdapo.replay.state import ReplayState
from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.scorer import Scorer
from asyncdapo.rollout.torch_engine.engine import TorchEngine
from asyncdapo.rollout.worker import RolloutWorker
from asyncdapo.tokens import load_tokenizer
from asyncdapo.transport.keys import RunKeys
from asyncdapo.weights.backend import Backend
from asyncdapo.weights.group import WeightGroup, device_name
from asyncdapo.weights.layout import Manifest
from asyncdapo.weights.receiver import WeightReceiver
from asyncdapo.weights.sender import WeightSender

T = TypeVar("T")

BUSY_CPU_S = 10.0
WRITTEN_BLOCKS = 16_384
"""Steps in which a learner's CPU time and its blocks written (8 MiB) count as progress; an idle process makes none."""
MAX_STALLED = 3
"""Leases in a row that may stall at a worker before its engine is taken for hung."""


class Actor:
    """What all processes share: a name, the config, one thread for blocking work."""

    role: str

    def __init__(self, name: str, config: Config, keys: RunKeys, index: int = 0) -> None:
        """`index` counts the processes of this role."""
        self.name, self.config, self.keys, self.index = name, config, keys, index
        self.waits = Waits(name)
        self.group: WeightGroup | None = None
        self._open_log(log_path(config, name))
        faults.install(name, config.faults, Path(config.run.dir))
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def _open_log(self, path: Path) -> None:
        """This process's own log; the stacks of a crash in native code go there too."""
        path.parent.mkdir(exist_ok=True)
        stream = path.open("a", buffering=1)
        logging.basicConfig(stream=stream, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        faulthandler.enable(stream)
        install_stacks(stream)

    async def blocking(self, work: Callable[..., T], *args: Any) -> T:
        """Run blocking work in this process's one thread for it: never two at a time."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *args)

    async def entry(self) -> Entry:
        """Who this process is."""
        return this_process(self.role, self.index)

    async def stacks(self) -> str:
        """Where all its threads and tasks stand."""
        return stacks()

    def host(self) -> str:
        """Where others reach this process: loopback on a Ray of our own, else this node's address."""
        return ray.util.get_node_ip_address() if self.config.controller.ray_address else "127.0.0.1"


def log_path(config: Config, name: str) -> Path:
    """The log of a process."""
    return Path(config.run.dir) / "logs" / f"{name}.log"


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a life of the replay server begins."""

    roll_back_to: int | None = None
    """Train step of the checkpoint that the run goes on from; none to take the ledger as it stands."""
    reason: str = ""
    totals: dict[str, float] = field(default_factory=dict)
    """The last metrics line, from which counts go on that aren't in the ledger."""
    ports: tuple[int, int] = (0, 0)
    """For workers and for the learner; 0 is any."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What the others need to know of an open replay server."""

    branch: int
    rollout_address: str
    learner_address: str
    ports: tuple[int, int]
    data_ends: bool
    """Whether the prompts can be used up before the last step."""
    num_left_out: int
    """Rows whose prompt is too long."""
    eval_prompts: list[Prompt]


class ReplayActor(Actor):
    """Prompts in, batches out: the process that decides what is sampled and what is trained on."""

    role = "replay"

    async def start(self, start: Start) -> Opened:
        """Open stream, journal and sockets, and go on from what the ledger says."""
        config = self.config
        task = open_task(config.prompts, num_eval=config.eval.num_held_out, seed=config.run.seed)
        tokenizer = load_tokenizer(config.model.path)
        encode = tokenizer.prompt_encoder(config.prompts.chat_template)
        self.stream = PromptStream(config.prompts, task, encode, config.run.seed)
        self.server = ReplayServer(
            config.replay,
            self._make_state,
            self._open_journal(start),
            self.stream.prompt_at,
            group_size=config.rollout.group_size,
            seed=config.run.seed,
            total_slots=config.rollout.num_workers * config.rollout.slots,
            max_failure_ratio=config.reward.max_failure_ratio,
            totals=start.totals,
            host=self.host(),
            ports=start.ports,
            curve=self.keys.server,
        )
        return Opened(
            branch=self.server.branch,
            rollout_address=self.server.rollout_address,
            learner_address=self.server.learner_address,
            ports=self.server.ports,
            data_ends=self.stream.num_prompts is not None,
            num_left_out=self.stream.num_left_out,
            eval_prompts=self.stream.eval_prompts(config.eval.num_held_out),
        )

    def _open_journal(self, start: Start) -> Journal:
        journal = Journal(Path(self.config.run.dir), keep_payloads=self.config.replay.keep_payloads)
        if start.roll_back_to is not None:
            journal.roll_back(start.roll_back_to, start.reason, self.config.replay)
        return journal

    def _make_state(self, recovered: Recovered) -> ReplayState:
        return ReplayState(
            self.config.replay,
            self.config.filter,
            max_attempts=self.config.prompts.max_attempts,
            num_prompts=self.stream.num_prompts,
            recovered=recovered,
        )

    async def serve(self) -> None:
        """Serve both sockets; raises what ends the run."""
        await self.server.run()

    async def pulse(self) -> Pulse:
        status = self.server.status()
        self.waits.stand(*replay_wait(status["why_waiting"]))
        patience_s = LOST_TICKS * self.config.replay.heartbeat_s
        return Pulse(
            entries=[await self.entry()],
            waits=self.waits.open(),
            progress={key: status[key] for key in ("sampled_tokens", "filling_step", "branch")},
            lost=[
                index
                for index, worker in status["known_workers"].items()
                if worker["silent_s"] > patience_s or worker["stalled"] > MAX_STALLED
            ],
        )

    async def begin(self) -> None:
        """Grant leases from now on."""
        await self.server.begin()

    async def pause(self) -> None:
        """Grant none from now on."""
        await self.server.pause()

    async def roll_back(self, step: int, reason: str) -> int:
        """Go back to the checkpoint of `step`. Returns the new branch."""
        return await self.server.roll_back(step, reason)

    async def lose_worker(self, index: int) -> None:
        """The worker's process is dead: its leases are lost."""
        await self.server.lose_worker(index)

    async def trained(self, step: int, summary: dict[str, float]) -> dict[str, float]:
        """Batch `step` is trained on. Returns replay's metrics of the step."""
        return await self.server.trained(step, summary)

    async def published(self, version: int) -> None:
        """The send of `version` is over."""
        await self.server.published(version)

    async def covered(self, step: int) -> None:
        """The oldest checkpoint that the run may go back to is that of `step`: payloads up to it may go."""
        await self.server.covered(step)

    async def evaluate(self, requests: list[EvalRequest], share: float) -> list[EvalAnswer]:
        """Answers to all requests, in their order."""
        return await self.server.evaluate(requests, share)

    async def finish(self) -> None:
        """No further step: leases are withdrawn, open prompts end `unused`."""
        await self.server.finish()


class RolloutActor(Actor):
    """One worker: an engine that never idles while credit is left, a scorer, and a receiver of weights."""

    role = "rollout"

    async def start(self, replay_address: str) -> None:
        """Load the model (the only time a weight file is opened), start the verifiers, and connect to the replay
        server."""
        config = self.config
        self.engine = TorchEngine(config.model.path, config.rollout, max_prompt_length=config.prompts.max_prompt_length)
        await self.engine.start()
        pool = ScorerPool(config.reward.verifier, config.reward.processes, config.reward.timeout_s)
        self.scorer = Scorer(config.reward, pool, load_tokenizer(config.model.path).decode)
        await self.scorer.start()
        self.worker = RolloutWorker(
            self.index,
            config.rollout,
            config.replay.heartbeat_s,
            self.engine,
            self.scorer,
            replay_address,
            curve=self.keys.client,
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


class LearnerActor(Actor):
    """The learner: one batch in, one version out."""

    role = "learner"

    async def start(self, replay_address: str, checkpoint: Path | None) -> None:
        """Load the model, go on from the checkpoint if there is one, and connect to the replay server."""
        config = self.config
        torch.set_num_threads(config.learner.threads)
        self.learner = await self.blocking(self._load, checkpoint)
        self.feed = BatchFeed(replay_address, curve=self.keys.client)
        self.num_sent = 0
        self.stopped = asyncio.Event()

    def _load(self, checkpoint: Path | None) -> Learner:
        config = self.config
        learner = Learner(
            config.model.path,
            config.loss,
            config.learner,
            temperature=config.rollout.temperature,
            staleness_bound=config.replay.staleness_bound,
            seed=config.run.seed,
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
            waits=self.waits.open(),
            progress={
                "version": self.learner.version,
                "sent": self.num_sent,
                "cpu": usage.ru_utime // BUSY_CPU_S,  # a long step or a large checkpoint moves no other counter
                "written": usage.ru_oublock // WRITTEN_BLOCKS,
            },
        )

    async def device(self) -> str:
        return device_name(self.learner.device)

    async def host_weights(self, world_size: int, backend: Backend) -> tuple[str, Manifest]:
        """Open the store of a new process group. Returns its address, and what will be sent."""
        if self.group:
            self.group.close()
        timeout_s = self.config.weights.timeout_s
        self.group = WeightGroup.create_master(self.host(), world_size, backend, timeout_s)
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
        return {"bytes": report.num_bytes, "seconds": report.seconds}

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

    async def save(self, step: int, branch: int) -> None:
        """Write the checkpoint of `step`."""
        with self.waits.on(NOBODY, f"writes the checkpoint of step {step}"):
            await self.blocking(self.learner.save, Path(self.config.run.dir), step, branch)
        faults.point("after_checkpoint")
