"""vLLM engine: implements `Engine` with vLLM's AsyncLLM, whose processes generate continuously.

    event loop: generate ──token ids──▶ EngineCore (and, with tensor_parallel, a worker process for each GPU)
                Sample   ◀──outputs──── EngineCore
    event loop: load_weights ──pause, start, update, finish, resume──▶ workers, which hold the new weights

Every sample is a separate request to vLLM; those of a group are added together and share the prefix cache. The cache's
salt changes with every load, and samples that have no token yet are then requested again, so that no prompt is computed
with the weights of two versions. Version labels (`samples.py`) change while generation is paused.

A load that fails half-way leaves the engine paused, with the requests in it: the next complete load resumes them. When
a process of the engine ends for any reason, every pending and every later call raises EngineError.

The processes are started by a thread that lives as long as the engine: the kernel's parent-death signal (`plugin.py`)
comes when the *thread* that started a process ends.
"""

# vLLM is an extra, and may not be installed where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from asyncdapo.errors import EngineError
from asyncdapo.model.files import ModelFiles
from asyncdapo.model.stop_tokens import stop_token_ids
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Limits, LoadTimes, Request, Sample, Sampled
from asyncdapo.rollout.life import Life
from asyncdapo.rollout.vllm_engine.arguments import engine_args, set_environment
from asyncdapo.rollout.vllm_engine.processes import Family, child_pids
from asyncdapo.rollout.vllm_engine.samples import Job, Stream

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput

    from asyncdapo.rollout.vllm_engine.adapter import Adapter

T = TypeVar("T")

END_TIMEOUT_S = 5.0
"""Time for a process of a stopped engine to end by itself; then it is killed."""


class VllmEngine:
    """vLLM in processes of its own: continuous batching of whatever model vLLM knows, on GPUs or CPU.

    `max_prompt_length` and `config.max_response_length` bound every sequence, and `max_context` both together (None:
    their sum). `transfer` names the weight-transfer backend that `worker_extension`, the dotted name of a class mixed
    into vLLM's worker, registers with vLLM. `memory_fraction` is the share of a GPU for weights and KV cache.
    `stop_token_ids` replaces the checkpoint's own.
    """

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        max_prompt_length: int,
        max_context: int | None = None,
        transfer: str,
        worker_extension: str,
        memory_fraction: float = 0.9,
        stop_token_ids: list[int] | None = None,
    ) -> None:
        self._model_path, self._config = model_path, config
        self._max_prompt_length, self._memory_fraction = max_prompt_length, memory_fraction
        self._max_context = max_context or max_prompt_length + config.max_response_length
        self._transfer, self._worker_extension = transfer, worker_extension
        self._stop_token_ids = stop_token_ids

        self._parent = ThreadPoolExecutor(1, "vllm-parent")
        self._making: Future[tuple[Adapter, Family]] | None = None
        self._life = Life("the vLLM engine")
        self._adapter: Adapter | None = None
        self._family: Family | None = None
        """Both are None until vLLM has started."""

        self._jobs: dict[Job, asyncio.Future[list[Sample]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._request_ids = map(str, itertools.count())
        self._tokenless: set[str] = set()
        """vLLM's ids of the samples that have no token yet."""

        self._loading, self._pausing = asyncio.Lock(), asyncio.Lock()
        self._num_pauses = self._num_loads = self._version = 0
        self._half_loaded = False

        self._num_tokens = self._num_prefill_tokens = 0

    @property
    def num_slots(self) -> int:
        return self._config.slots

    @property
    def num_outstanding(self) -> int:
        return sum(job.num_unfinished for job in self._jobs)

    @property
    def loaded_version(self) -> int:
        return self._version

    @property
    def stops_to_load(self) -> bool:
        return True

    @property
    def _vllm(self) -> Adapter:
        assert self._adapter is not None, "the engine has not been started"
        return self._adapter

    def pids(self) -> list[int]:
        """Pids of the engine's processes; none before the start and after the stop."""
        return self._family.pids() if self._family else []

    def gauges(self) -> dict[str, float]:
        scheduler = self._adapter.gauges() if self._adapter else {}
        return {"tokens": self._num_tokens, "prefill_tokens": self._num_prefill_tokens, **scheduler}

    # --------------------------------------------------------------------------------------------------- start and end

    async def start(self) -> None:
        """Raises UserError for a configuration or checkpoint that vLLM can't use, EngineError when vLLM fails."""
        self._making = self._parent.submit(self._make)
        self._adapter, self._family = await asyncio.wrap_future(self._making)
        self._family.watch(self._on_death)
        self._life.begin()
        await self._unless_ended(self._vllm.begin(self._version))

    def _make(self) -> tuple[Adapter, Family]:
        """Start vLLM. Runs in the thread that stays the parent of the engine's processes."""
        set_environment(self._config)
        from asyncdapo.rollout.vllm_engine.adapter import Adapter, launch

        files = ModelFiles(self._model_path)
        directory = files.fetch()
        stop = self._stop_token_ids
        stop = sorted(stop_token_ids(files)) if stop is None else stop
        arguments = engine_args(
            directory,
            self._config,
            max_context=self._max_context,
            memory_fraction=self._memory_fraction,
            transfer=self._transfer,
            worker_extension=self._worker_extension,
        )
        others = child_pids()
        vllm = Adapter(launch(arguments), stop)
        return vllm, Family(child_pids() - others)

    async def ended(self) -> None:
        await self._life.over()

    async def stop(self) -> None:
        """End the engine and all its processes."""
        making, self._making = self._making, None
        if making is not None:
            await asyncio.wait([asyncio.wrap_future(making)])
            if making.exception() is None:
                self._on_end(None)
                await asyncio.get_running_loop().run_in_executor(self._parent, self._shut_down, *making.result())
        self._parent.shutdown()

    def _shut_down(self, vllm: Adapter, family: Family) -> None:
        vllm.shut_down()
        family.end(END_TIMEOUT_S)

    def _on_death(self, pid: int) -> None:
        self._on_end(EngineError(f"its process {pid} ended"))

    def _on_end(self, cause: BaseException | None) -> None:
        """Generation has ended: tell every waiting caller."""
        if not self._life.alive:
            return
        if self._family is not None:
            self._family.unwatch()
        self._life.end(cause, self._jobs.values())
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _unless_ended(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of the work. The work continues if the caller is cancelled. Raises EngineError if the engine ends
        first."""
        task = self._spawn(work)
        await asyncio.wait([task, self._life.ended], return_when=asyncio.FIRST_COMPLETED)
        self._life.require()
        return task.result()

    # -------------------------------------------------------------------------------------------------------- generate

    async def generate(self, request: Request) -> list[Sample]:
        """Raises ValueError for a request that can't fit, EngineError if the engine fails."""
        self._life.require()
        limits = Limits(
            max_prompt_length=self._max_prompt_length,
            max_response_length=self._config.max_response_length,
            max_context=self._max_context,
            vocab_size=self._vllm.vocab_size,
        )
        limits.refuse_unfit(request)
        params_of_samples = self._params(request)
        job = Job(request)
        done = self._jobs[job] = asyncio.get_running_loop().create_future()
        for index, params in enumerate(params_of_samples):
            self._spawn(self._sample(job, index, params)).add_done_callback(self._note_failure)
        try:
            return await done
        finally:
            del self._jobs[job]
            if job.followers and self._life.alive:
                self._spawn(self._vllm.abort(job.followers))

    async def so_far(self, request: Request) -> list[Sampled]:
        self._life.require()
        job = next((job for job in self._jobs if job.request is request), None)
        if job and request.handed_back:
            await self._unless_ended(self._give_out(job))
        return job.so_far() if job else []

    async def _give_out(self, job: Job) -> None:
        """End the sequences of the job, so that vLLM gives out the tokens that it holds back (`STREAM_INTERVAL`)."""
        running = {own_id: task for own_id, task in job.followers.items() if own_id not in self._tokenless}
        await self._vllm.abort(running)
        await asyncio.gather(*filter(None, running.values()))

    def _params(self, request: Request) -> list[SamplingParams]:
        """Training passes no seeds to vLLM: a seeded sequence has its own random number generator, which costs extra
        kernels for every token."""
        if request.seeded:
            return [self._vllm.params(request.sampling, seed) for seed in request.seeds]
        return [self._vllm.params(request.sampling)] * len(request.seeds)

    async def _sample(self, job: Job, index: int, params: SamplingParams) -> None:
        """One sample of the job, requested again if a load aborts it. Ends early if the job is over."""
        sample = None
        while sample is None and job in self._jobs and not job.request.handed_back:
            request_id = next(self._request_ids)
            job.followers[request_id] = asyncio.current_task()
            self._tokenless.add(request_id)
            try:
                stream = job.streams[index] = Stream()
                sample = await self._follow(job, params, request_id, stream)
            finally:
                del job.followers[request_id]
                self._tokenless.discard(request_id)
        if sample is not None and job in self._jobs:
            self._finish(job, index, sample)

    async def _follow(self, job: Job, params: SamplingParams, request_id: str, stream: Stream) -> Sample | None:
        """Collect the outputs for this id. Returns the sample; None if it was aborted."""
        prompt_ids, priority = job.request.prompt_ids, job.request.priority
        outputs = self._vllm.generate(prompt_ids, params, request_id, salt=self._num_loads, priority=priority)
        finish_reason = None
        async for output in outputs:
            [completion] = output.outputs
            num_tokens = stream.add(completion, self._version)
            if job in self._jobs and num_tokens:
                if request_id in self._tokenless:
                    self._tokenless.discard(request_id)
                    self._note_start(job, output)
                job.request.num_sampled += num_tokens
                self._num_tokens += num_tokens
            finish_reason = completion.finish_reason
        if finish_reason == "abort":  # tokens that arrived after the load chose what to abort are dropped, too
            job.request.num_running -= bool(stream.token_ids)
            return None
        if finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended a sequence with the reason {finish_reason!r}")
        return stream.finish(finish_reason)

    def _note_start(self, job: Job, output: RequestOutput) -> None:
        self._num_prefill_tokens += len(job.request.prompt_ids) - (output.num_cached_tokens or 0)
        job.request.num_running += 1
        if not job.started:
            job.started = True
            if job.request.on_started is not None:
                job.request.on_started(self._version)

    def _finish(self, job: Job, index: int, sample: Sample) -> None:
        job.finish(index, sample)
        job.request.num_running -= 1
        if job.request.on_sample_done is not None:
            job.request.on_sample_done()
        if not job.num_unfinished and not self._jobs[job].done():
            self._jobs[job].set_result([sample for sample in job.samples if sample is not None])

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        """One failed sequence ends the engine: others may be stuck in the same way."""
        if not task.cancelled() and task.exception() is not None:
            self._on_end(task.exception())

    # --------------------------------------------------------------------------------------------------------- weights

    async def rpc(self, method: str, *args: Any) -> list[Any]:
        """The results of a method of the workers, in rank order. Generation waits while it runs. Raises RunError if it
        raised, EngineError if the engine ends first."""
        self._life.require()
        return await self._unless_ended(self._vllm.rpc(method, *args))

    async def load_weights(self, version: int, weights: Any) -> LoadTimes:
        """Load the version that the workers have received; `weights` isn't used. Raises WeightsError; generation then
        stays paused until another load succeeds."""
        self._life.require()
        return await self._unless_ended(self._load(version))

    async def _load(self, version: int) -> LoadTimes:
        """One load at a time, and never cancelled: the engine couldn't continue after half a load."""
        async with self._loading:
            began_s = time.monotonic()
            async with self.paused():
                paused_s = time.monotonic()
                self._num_loads += 1
                await self._vllm.abort(self._tokenless)
                self._half_loaded = True
                await self._vllm.load(version)
                self._half_loaded = False
                self._version = version
                loaded_s = time.monotonic()
            return LoadTimes(
                pause_s=paused_s - began_s, load_s=loaded_s - paused_s, resume_s=time.monotonic() - loaded_s
            )

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Nothing is sampled inside; running and new requests wait. Generation resumes when the last of several pauses
        ends, unless a load has failed half-way."""
        self._num_pauses += 1
        try:
            async with self._pausing:
                await self._vllm.pause(recompute=self._config.on_update == "recompute")
            yield
        finally:
            self._num_pauses -= 1
            async with self._pausing:
                if not self._num_pauses and not self._half_loaded and self._life.alive:
                    await self._vllm.resume()
