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
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch

from asyncdapo.config import Config
from asyncdapo.learner.feed import BatchFeed
from asyncdapo.learner.learner import Learner
from asyncdapo.messages import EvalAnswer, EvalRequest, NoBatch, Prompt
from asyncdapo.prompts.registry import open_task
from asyncdapo.prompts.stream import PromptStream
from asyncdapo.replay.journal import Journal
from asyncdapo.replay.server import ReplayServer
from asyncdapo.replay.state import ReplayState
from asyncdapo.reward.registry import make_verifier
from asyncdapo.reward.scorer import Scorer
from asyncdapo.rollout.torch_engine.engine import TorchEngine
from asyncdapo.rollout.worker import RolloutWorker
from asyncdapo.tokens import load_tokenizer
from asyncdapo.weights.backend import Backend
from asyncdapo.weights.group import WeightGroup, device_name
from asyncdapo.weights.layout import Manifest
from asyncdapo.weights.receiver import WeightReceiver
from asyncdapo.weights.sender import WeightSender

T = TypeVar("T")


class Actor:
    """What all processes share: a name, the config, one thread for blocking work."""

    def __init__(self, name: str, config: Config) -> None:
        self.name, self.config = name, config
        self.group: WeightGroup | None = None
        self._open_log(Path(config.run.dir) / "logs" / f"{name}.log")
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def _open_log(self, path: Path) -> None:
        """This process's own log; the stacks of a crash in native code go there too."""
        path.parent.mkdir(exist_ok=True)
        stream = path.open("a", buffering=1)
        logging.basicConfig(stream=stream, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        faulthandler.enable(stream)

    async def blocking(self, work: Callable[..., T], *args: Any) -> T:
        """Run blocking work in this process's one thread for it: never two at a time."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *args)

    def host(self) -> str:
        """Where others reach this process: loopback on a Ray of our own, else this node's address."""
        return ray.util.get_node_ip_address() if self.config.controller.ray_address else "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What the others need to know of an open replay server."""

    rollout_address: str
    learner_address: str
    data_ends: bool
    """Whether the prompts can be used up before the last step."""
    num_left_out: int
    """Rows whose prompt is too long."""
    eval_prompts: list[Prompt]


class ReplayActor(Actor):
    """Prompts in, batches out: the process that decides what is sampled and what is trained on."""

    async def start(self) -> Opened:
        """Open stream, journal and sockets."""
        config = self.config
        task = open_task(config.prompts, num_eval=config.eval.num_held_out, seed=config.run.seed)
        encode = load_tokenizer(config.model.path).prompt_encoder(config.prompts.chat_template)
        self.stream = PromptStream(config.prompts, task, encode, config.run.seed)
        state = ReplayState(
            config.replay,
            config.filter,
            max_attempts=config.prompts.max_attempts,
            num_prompts=self.stream.num_prompts,
        )
        self.server = ReplayServer(
            config.replay,
            state,
            Journal(Path(config.run.dir), keep_payloads=config.replay.keep_payloads),
            self.stream.prompt_at,
            group_size=config.rollout.group_size,
            seed=config.run.seed,
            total_slots=config.rollout.num_workers * config.rollout.slots,
            host=self.host(),
        )
        return Opened(
            rollout_address=self.server.rollout_address,
            learner_address=self.server.learner_address,
            data_ends=self.stream.num_prompts is not None,
            num_left_out=self.stream.num_left_out,
            eval_prompts=self.stream.eval_prompts(config.eval.num_held_out),
        )

    async def serve(self) -> None:
        """Serve both sockets; raises what ends the run."""
        await self.server.run()

    async def begin(self) -> None:
        """Grant leases from now on."""
        await self.server.begin()

    async def trained(self, step: int, summary: dict[str, float]) -> dict[str, float]:
        """Batch `step` is trained on. Returns replay's metrics of the step."""
        return await self.server.trained(step, summary)

    async def published(self, version: int) -> None:
        """The send of `version` is over."""
        await self.server.published(version)

    async def covered(self, step: int) -> None:
        """A checkpoint of `step` exists: payloads up to it may go."""
        await self.server.covered(step)

    async def evaluate(self, requests: list[EvalRequest], share: float) -> list[EvalAnswer]:
        """Answers to all requests, in their order."""
        return await self.server.evaluate(requests, share)

    async def finish(self) -> None:
        """No further step: leases are withdrawn, open prompts end `unused`."""
        await self.server.finish()

    async def status(self) -> dict[str, Any]:
        """Who waits for whom, and gauges."""
        return self.server.status()


class RolloutActor(Actor):
    """One worker: an engine that never idles while credit is left, a scorer, and a receiver of weights."""

    def __init__(self, name: str, config: Config, index: int) -> None:
        super().__init__(name, config)
        self.index = index

    async def start(self, replay_address: str) -> None:
        """Load the model (the only time a weight file is opened) and connect to the replay server."""
        config = self.config
        self.engine = TorchEngine(config.model.path, config.rollout, max_prompt_length=config.prompts.max_prompt_length)
        await self.engine.start()
        decode = load_tokenizer(config.model.path).decode
        scorer = Scorer(config.reward, make_verifier(config.reward.verifier), decode)
        self.worker = RolloutWorker(
            self.index, config.rollout, config.replay.heartbeat_s, self.engine, scorer, replay_address
        )

    async def serve(self) -> None:
        """Generate and score; raises what ends the worker."""
        await self.worker.run()

    async def device(self) -> str:
        return device_name(self.engine.device)

    async def join_weights(
        self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest
    ) -> None:
        """Join the process group in which the learner sends; leave the one before."""
        await self.blocking(self._join, address, rank, world_size, backend, manifest)

    def _join(self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest) -> None:
        if self.group:
            self.group.close()
        self.group = WeightGroup.join(address, rank, world_size, backend, self.config.weights.timeout_s)
        self.receiver = WeightReceiver(self.group, manifest, self.engine.device)

    async def receive_weights(self, version: int) -> dict[str, float]:
        """Receive while generating, then generate with the new weights from the next token on."""
        began = time.monotonic()
        weights = await self.blocking(self.receiver.receive, version)
        received = time.monotonic()
        await self.worker.load_weights(version, weights)
        return {"receive_s": received - began, "load_s": time.monotonic() - received}


class LearnerActor(Actor):
    """The learner: one batch in, one version out."""

    async def start(self, replay_address: str) -> None:
        """Load the model and connect to the replay server."""
        config = self.config
        torch.set_num_threads(config.learner.threads)
        self.learner = await self.blocking(self._load)
        self.feed = BatchFeed(replay_address)
        self.stopped = asyncio.Event()

    def _load(self) -> Learner:
        config = self.config
        return Learner(
            config.model.path,
            config.loss,
            config.learner,
            temperature=config.rollout.temperature,
            staleness_bound=config.replay.staleness_bound,
            seed=config.run.seed,
        )

    async def serve(self) -> None:
        """Lasts as long as the process, so that its death ends the run at once."""
        await self.stopped.wait()

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

    async def accept_workers(self) -> None:
        """Wait for every worker to join."""
        await self.blocking(self.group.connect)
        self.sender = WeightSender(self.group, self.manifest, self.config.weights.bucket_mb << 20)

    async def send_weights(self, version: int) -> dict[str, float]:
        """Broadcast the weights as those of `version`; over when every worker has checked them."""
        report = await self.blocking(self.sender.send, version, self.learner.weights())
        return {"bytes": report.num_bytes, "seconds": report.seconds}

    async def take_batch(self, step: int) -> str:
        """Wait for batch `step` and keep it for `train_step`. Returns why there is none, once the data is used up."""
        taken = await self.feed.take(step)
        if isinstance(taken, NoBatch):
            return taken.reason
        self.batch, self.payload = taken
        return ""

    async def train_step(self) -> dict[str, float]:
        """Train on the batch taken. Returns the learner's metrics."""
        return await self.blocking(self.learner.train, self.batch, self.payload)

    async def save(self, step: int) -> None:
        """Write the checkpoint of `step`."""
        await self.blocking(self.learner.save, Path(self.config.run.dir), step)
