"""Torch engine: implements `Engine` with a thread that generates continuously.

    event loop: generate, load_weights, stop ──inbox──▶ thread: Runner.step, again and again
    event loop: futures, on_started          ◀─call_soon_threadsafe── thread

Only the thread touches the runner. Between two tokens it empties the inbox; without work it sleeps on a condition. A
second thread fuses new weights into the set that isn't in use, so generation continues until the pointers are swapped.
If the engine's thread ends for any reason, every pending and every later call raises EngineError with the cause.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from asyncdapo.errors import ConfigError, WeightsError
from asyncdapo.model.shape import settled_dtype
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Limits, LoadTimes, Request, Sample, Sampled
from asyncdapo.rollout.life import Life
from asyncdapo.rollout.torch_engine.checkpoint import read_checkpoint
from asyncdapo.rollout.torch_engine.compiled.compiled_model import fastest_model
from asyncdapo.rollout.torch_engine.runner import Counters, Progress, Runner
from asyncdapo.rollout.torch_engine.scheduler import Job
from asyncdapo.rollout.torch_engine.weights import Weights

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(kw_only=True)
class _Loaded:
    """What an engine has from its start to its end."""

    loop: asyncio.AbstractEventLoop
    limits: Limits
    runner: Runner
    spare: Weights
    """The set that doesn't generate."""


class TorchEngine:
    """The embedded engine: continuous batching of a llama-family checkpoint on CPU or GPU.

    `max_prompt_length` and `config.max_response_length` bound every sequence, and `max_context` both together (None:
    their sum). `stop_token_ids` replaces the checkpoint's own end-of-sequence ids.
    """

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        max_prompt_length: int,
        max_context: int | None = None,
        stop_token_ids: list[int] | None = None,
    ) -> None:
        self._model_path = model_path
        self._config = config
        self._max_prompt_length = max_prompt_length
        self._max_context = max_context or max_prompt_length + config.max_response_length
        self._stop_token_ids = stop_token_ids
        self._condition = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._jobs: dict[Job, asyncio.Future[list[Sample]]] = {}
        self._swapped: asyncio.Future[None] | None = None
        self._loading = asyncio.Lock()
        self._filler = ThreadPoolExecutor(1, "weights", torch.set_num_threads, (config.threads,))
        self._stopping = False
        self._life = Life("the torch engine")
        self._loaded: _Loaded | None = None
        self._thread: threading.Thread | None = None
        self._version = 0
        self._untold = Progress()
        """What the event loop wasn't told yet: samples that ended, but so few that their slots aren't filled yet."""
        self._counters = Counters()

    @property
    def num_slots(self) -> int:
        return self._config.slots

    @property
    def num_outstanding(self) -> int:
        return sum([job.num_unfinished for job in self._jobs])  # half the time of a generator, at every wake-up

    @property
    def loaded_version(self) -> int:
        return self._version

    @property
    def stops_to_load(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return self._alive().runner.device

    def gauges(self) -> dict[str, float]:
        """Adds `steps`, and `slot_steps`: the slots in use, summed over steps."""
        counters = self._counters
        return {
            "tokens": counters.tokens,
            "prefill_tokens": counters.prefill_tokens,
            "steps": counters.steps,
            "slot_steps": counters.slot_steps,
        }

    # ---------------------------------------------------------------------------------------------- in the event loop

    async def start(self) -> None:
        """Raises ConfigError for a checkpoint that can't be used. Only this method reads it."""
        loop = asyncio.get_running_loop()
        loaded = await loop.run_in_executor(self._filler, self._load, loop)
        self._loaded = loaded
        self._counters = loaded.runner.counters
        self._life.begin()
        generate = partial(self._generate_until_stopped, loaded)
        self._thread = threading.Thread(target=generate, name="torch-engine", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> list[Sample]:
        """Raises ValueError for a request that can't fit, EngineError if the engine fails."""
        loaded = self._alive()
        loaded.limits.refuse_unfit(request)
        job = Job(request)
        done = self._jobs[job] = loaded.loop.create_future()
        self._order(lambda: loaded.runner.add(job))
        try:
            return await done
        finally:
            del self._jobs[job]
            if job.num_unfinished:
                self._order(lambda: loaded.runner.withdraw(job))

    async def so_far(self, request: Request) -> list[Sampled]:
        loaded = self._alive()
        job = next((job for job in self._jobs if job.request is request), None)
        if job is None:
            return []
        found: asyncio.Future[list[Sampled]] = loaded.loop.create_future()

        def tell() -> None:
            loaded.loop.call_soon_threadsafe(_resolve, found, loaded.runner.so_far(job))

        self._order(tell)
        made = self._jobs[job]
        await asyncio.wait([found, made], return_when=asyncio.FIRST_COMPLETED)
        if found.done():
            return found.result()
        return [] if made.cancelled() or made.exception() else list(made.result())

    async def load_weights(self, version: int, weights: Mapping[str, torch.Tensor]) -> LoadTimes:
        """Raises WeightsError for tensors that don't fit the model; the engine then keeps its weights."""
        began_s = time.monotonic()
        async with self._loading:
            if self._swapped is not None:  # an earlier call may have been cancelled before its swap
                await asyncio.wait([self._swapped])
            loaded = self._alive()
            try:
                await loaded.loop.run_in_executor(self._filler, loaded.spare.fill, weights)
            except ValueError as error:
                raise WeightsError(f"version {version} can't be loaded: {error}") from error
            self._life.require()
            swapped = self._swapped = loaded.loop.create_future()
            self._order(lambda: self._swap(loaded, version, swapped))
            await asyncio.shield(swapped)
        return LoadTimes(load_s=time.monotonic() - began_s)

    async def ended(self) -> None:
        await self._life.over()

    async def stop(self) -> None:
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._life.alive and self._thread:
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
            self._on_end(None)
            self._loaded = None
        self._filler.shutdown()

    def _alive(self) -> _Loaded:
        """Raises EngineError before the start and after the end."""
        self._life.require()
        assert self._loaded is not None
        return self._loaded

    def _order(self, order: Callable[[], None]) -> None:
        """Have the engine's thread call this between two tokens."""
        with self._condition:
            self._inbox.append(order)
            self._condition.notify()

    def _deliver(self, version: int, progress: Progress) -> None:
        for job in progress.started:
            if job in self._jobs and job.request.on_started is not None:
                job.request.on_started(version)
        for job in progress.ended:
            if job in self._jobs and job.request.on_sample_done is not None:
                job.request.on_sample_done()
        for job in progress.ended:
            if job in self._jobs and not job.num_unfinished and not self._jobs[job].done():
                self._jobs[job].set_result([sample for sample in job.samples if sample is not None])

    def _on_end(self, cause: BaseException | None) -> None:
        """Generation has ended: tell every waiting caller."""
        self._life.end(cause, (*self._jobs.values(), self._swapped))

    # ----------------------------------------------------------------------------------------- in the filler's thread

    def _load(self, loop: asyncio.AbstractEventLoop) -> _Loaded:
        checkpoint = read_checkpoint(self._model_path)
        num_positions = self._max_context
        if num_positions > checkpoint.shape.max_positions:
            raise ConfigError(
                "rollout.max_response_length",
                f"prompt and response need {num_positions} positions, the model has {checkpoint.shape.max_positions}",
                self._config.max_response_length,
            )
        device = self._device()
        dtype = DTYPES[settled_dtype(self._config.dtype, on_gpu=device.type == "cuda")]
        model = fastest_model(checkpoint, self._config.slots, self._max_context, dtype, device, self._config.threads)
        weights, spare = model.new_weights(), model.new_weights()
        try:
            weights.fill(checkpoint.tensors())
        except ValueError as error:
            raise ConfigError("model.path", str(error), self._model_path) from error
        stop_token_ids = checkpoint.stop_token_ids if self._stop_token_ids is None else frozenset(self._stop_token_ids)
        limits = Limits(
            max_prompt_length=self._max_prompt_length,
            max_response_length=self._config.max_response_length,
            max_context=self._max_context,
            vocab_size=checkpoint.shape.vocab_size,
        )
        runner = Runner(model, self._config, limits, stop_token_ids, weights)
        return _Loaded(loop=loop, limits=limits, runner=runner, spare=spare)

    def _device(self) -> torch.device:
        if self._config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("rollout.device", "there is no GPU here", self._config.device, "use auto or cpu")
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(auto if self._config.device == "auto" else self._config.device)

    # ----------------------------------------------------------------------------------------- in the engine's thread

    def _generate_until_stopped(self, loaded: _Loaded) -> None:
        torch.set_num_threads(self._config.threads)
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._turn(loaded, self._wait_for_orders(loaded.runner))
        finally:
            # No handler: the exception still reaches the thread's hook, which prints it.
            loaded.loop.call_soon_threadsafe(self._on_end, sys.exception())

    def _wait_for_orders(self, runner: Runner) -> list[Callable[[], None]]:
        """The orders since the last turn. Waits for one only if no sequence runs or waits."""
        with self._condition:
            while not (self._inbox or self._stopping or runner.has_work):
                self._condition.wait()
            orders, self._inbox = self._inbox, []
            return orders

    def _turn(self, loaded: _Loaded, orders: list[Callable[[], None]]) -> None:
        """Execute the orders, then sample the next token of every sequence."""
        for order in orders:
            order()
        progress, untold = loaded.runner.step(), self._untold
        untold.started += progress.started
        untold.ended += progress.ended
        is_complete = any(not job.num_unfinished for job in progress.ended)
        if untold.started or is_complete or loaded.runner.fills(len(untold.ended)):
            self._untold = Progress()
            loaded.loop.call_soon_threadsafe(self._deliver, self._version, untold)

    def _swap(self, loaded: _Loaded, version: int, swapped: asyncio.Future[None]) -> None:
        loaded.spare = loaded.runner.swap(version, loaded.spare)
        self._version = version
        loaded.loop.call_soon_threadsafe(_resolve, swapped, None)


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)
