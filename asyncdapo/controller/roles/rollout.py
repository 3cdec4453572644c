"""A rollout process: engine + what judges + rollout worker + its end of the weight group.

In: leases of the replay server, weights of the learner, commands of the controller. Out: scored groups. Does not own:
which prompts it samples (`replay/core`), which parts belong together (`engines`, `judging`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict

from asyncdapo.accounting.spans import Span, SpanRing
from asyncdapo.controller.process.health import Health
from asyncdapo.controller.process.roster import STOPPED, Entry, entry_of, state_of
from asyncdapo.controller.process.waits import NOBODY
from asyncdapo.controller.roles.base import ProcessBase, ProcessSpec
from asyncdapo.controller.roles.engines import Fitted, make_engine
from asyncdapo.controller.roles.judging import Judging, make_judging
from asyncdapo.eval_messages import Sampling
from asyncdapo.model.tokenizer import load_tokenizer
from asyncdapo.native.malloc import keep_freed_memory
from asyncdapo.rollout.engine import Priority, Request, Sample
from asyncdapo.rollout.worker import RolloutWorker
from asyncdapo.transport.backend import Backend
from asyncdapo.weights.manifest import Manifest

log = logging.getLogger("weights")


class RolloutProcess(ProcessBase):
    """One worker: an engine that never idles while credit is left, what judges its samples, a receiver of weights."""

    def __init__(self, spec: ProcessSpec, fitted: Fitted, judging: Judging, worker: RolloutWorker) -> None:
        super().__init__(spec)
        self.engine, self.end, self.engine_pids = fitted.engine, fitted.end, fitted.pids
        self.judging, self.worker = judging, worker
        self.num_received = 0
        self._one_version = asyncio.Lock()
        """Held from the first byte of a version to its load: the next one comes into the same memory."""
        self.updates = SpanRing()
        """Of its weights."""

    @classmethod
    async def start(cls, spec: ProcessSpec, replay_address: str, memory_fraction: float) -> RolloutProcess:
        """Load the model (the only time a weight file is opened), start what judges, and connect to the replay
        server. `memory_fraction`: share of the GPU's memory that the engine may take."""
        keep_freed_memory()
        config = spec.config
        fitted = make_engine(config, memory_fraction)
        await fitted.engine.start()
        tokenizer = load_tokenizer(config.model.tokenizer_files, config.prompts.template_arguments)
        judging = make_judging(config, fitted.engine, tokenizer)
        await judging.start()
        worker = RolloutWorker(
            spec.index,
            config.rollout,
            config.replay.heartbeat_s,
            fitted.engine,
            judging.rollouts,
            tokenizer.decode,
            replay_address,
            curve=spec.keys.client,
            overlong_filter=config.reward.overlong_filter,
        )
        return cls(spec, fitted, judging, worker)

    async def serve(self) -> None:
        """Generate and score; raises what ends the worker, the engine's own end included."""
        waits = (self.worker.run(), self.engine.ended(), *self.judging.ends())
        ends = [asyncio.ensure_future(wait) for wait in waits]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                if end.done():
                    end.result()
        finally:
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)

    async def health(self) -> Health:
        gauges = self.worker.gauges()
        if num_running := self.engine.num_outstanding:
            self.waits.stand(
                NOBODY, f"{num_running} sequences run or wait for a slot, {gauges['tokens']:.0f} tokens so far"
            )
        elif num_running := self.worker.num_running:
            self.waits.stand(NOBODY, f"verifiers or environments work on {num_running} groups")
        else:
            self.waits.stand("replay", "a lease")
        return Health(
            entries=[self.spec.entry(), *self._children()],
            waits=self.waits.open(),
            progress={
                "tokens": gauges["tokens"],
                "judged": self.judging.num_judged(),
                "received": self.num_received,
            },
        )

    def _children(self) -> list[Entry]:
        """The processes that this one started."""
        num_parts = self.config.rollout.tensor_parallel
        started = (
            ("engine", self.engine_pids(), 1 if num_parts == 1 else 1 + num_parts),  # several have one above them
            (self.judging.role, self.judging.processes.pids(), self.judging.most),
        )
        return [
            entry_of(role, self.spec.index * most + place, pid)
            for role, pids, most in started
            for place, pid in enumerate(pids)
        ]

    async def probe(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Sample]:
        """A completion of each prompt, ahead of every lease, for a comparison of log-probs."""
        requests = [
            Request(prompt_ids=prompt, seeds=[seed], sampling=sampling, priority=Priority.PROBE, seeded=True)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        with self.waits.on(NOBODY, "samples for a comparison of log-probs"):
            groups = await asyncio.gather(*map(self.engine.generate, requests))
        samples = [sample for [sample] in groups]
        self.worker.account.count_probe(sum(len(sample.token_ids) for sample in samples))
        return samples

    # ----------------------------------------------------------------------------------------------------- weights

    async def hears(self) -> bool:
        """True: its event loop is free, and no process of its engine is stopped."""
        entries = [entry for entry in self._children() if entry.role == "engine"]
        return not any(state_of(entry) in STOPPED for entry in entries)

    async def device(self) -> str:
        """The name of the device of its rank in the weight group."""
        return await self.end.device()

    async def make_weights_room(self, manifest: Manifest) -> None:
        """Have memory for these tensors."""
        with self.waits.on(NOBODY, "memory for new weights"):
            await self.end.make_room(manifest)

    async def join_weights(
        self, address: str, rank: int, world_size: int, backend: Backend, manifest: Manifest, sender: str = "learner"
    ) -> None:
        """Join the process group in which `sender` sends; leave the one before."""
        with self.waits.on(sender, "the weight group", self.config.weights.timeout_s):
            await self.end.join(address, rank, world_size, backend, manifest)

    async def receive_weights(self, version: int, branch: int, sender: str = "learner") -> dict[str, float]:
        """Receive while generating, then generate with the new weights from the next token on. Returns what of it took
        how many seconds."""
        async with self._one_version:
            began = time.monotonic()
            with self.waits.on(sender, f"the weights of version {version}", self.config.weights.timeout_s):
                weights = await self.end.receive(version, branch)
            receive_s = time.monotonic() - began
            times = await self.worker.load_weights(version, weights, branch)
        self.num_received += 1
        self.updates.add(Span(f"receive version {version}", began, began + receive_s))
        self.updates.add(Span(f"load version {version}", began + receive_s, time.monotonic()))
        self.span_file.write(states=self.worker.account.take_spans(), weights=self.updates.take())
        parts = {"receive_s": receive_s, **asdict(times)}
        log.info("version %d: %s", version, ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items()))
        return parts

    async def host_weights(self, backend: Backend) -> tuple[str, Manifest]:
        """Open a group in which to send the newest weights to a newcomer. Returns its address, and what is sent."""
        return await self.end.host(self.spec.host(), backend)

    async def send_weights(self, version: int, branch: int, newcomer: str) -> None:
        """Send what was received last, if it is this version, while generating."""
        with self.waits.on(newcomer, f"version {version} to arrive", self.config.weights.timeout_s):
            await self.end.send(version, branch, self.config.weights.bucket_mb << 20)

    async def abandon_workers(self) -> None:
        """Leave the group of the newcomer. Who waits in it fails now."""
        await self.end.abandon()

    async def leave_weights(self) -> None:
        """Leave the group in which it waits for weights, which then fails; another rank may be silent there."""
        await self.end.leave()
