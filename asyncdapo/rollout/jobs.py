"""A job: one lease or evaluation request, from its arrival to its answer.

In: leases and evaluation requests; the engine's samples, the scorer's scores. Out: `GroupDone` with its payload,
`GroupFailed` if the reward function raised, `EvalDone`. Does not own: tasks, sockets, credits.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np

from asyncdapo.errors import RewardError
from asyncdapo.eval_messages import EvalAnswer, EvalRequest
from asyncdapo.messages import (
    FinishReason,
    GroupDone,
    GroupFailed,
    Lease,
    Message,
    Phase,
    Progress,
    Prompt,
    Sampling,
    Score,
)
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import Engine, Request, Sample
from asyncdapo.rollout.groups import build_answer, build_group
from asyncdapo.seeds import eval_seed, sample_seed
from asyncdapo.transport.codec import Buffer
from asyncdapo.transport.payload import pack_answers

Outgoing = tuple[Message, Sequence[Buffer]]

Scorer = Callable[[Prompt, Sequence[np.ndarray], Sequence[FinishReason], int], Awaitable[list[Score]]]
"""(prompt, token ids of each completion, finish reasons, seed) -> a score for each, with `acc` among its metrics.
Raises RewardError if the user's reward function raised, VerdictError if it returned something that isn't a verdict."""

Decode = Callable[[np.ndarray], str]
"""Token ids int32 [T] -> text without special tokens."""

log = logging.getLogger("rollout")


@dataclass
class Job:
    """A lease (one request) or an evaluation (one request for each prompt) that the worker holds."""

    source: Lease | EvalRequest
    requests: list[Request]
    num_starting: int
    """Sequences not passed to the engine yet."""
    started_at: float = math.nan
    started_version: int | None = None
    all_sampled: bool = False

    @property
    def progress(self) -> Progress:
        """Its progress, for the heartbeat."""
        num_tokens = sum(request.num_sampled for request in self.requests)
        return Progress(num_tokens=num_tokens, phase=self._phase, started_version=self.started_version)

    @property
    def _phase(self) -> Phase:
        if self.all_sampled:
            return "sampled"
        return "sampling" if any(request.num_running for request in self.requests) else "waiting"


class Jobs:
    """Makes jobs and completes them with an engine and a scorer."""

    def __init__(
        self,
        worker: int,
        config: RolloutConfig,
        engine: Engine,
        score: Scorer,
        decode: Decode,
        on_room: Callable[[], None],
        *,
        overlong_filter: bool = False,
    ) -> None:
        """`on_room` is called whenever a sequence is complete. `overlong_filter`: see `groups.loss_mask`."""
        self._worker, self._engine, self._score, self._on_room = worker, engine, score, on_room
        self._decode = decode
        self._overlong_filter = overlong_filter
        self._sampling = Sampling(temperature=config.temperature, max_tokens=config.max_response_length)
        self._turn = asyncio.Lock() if config.deterministic else nullcontext()
        self._counts: Counter[str] = Counter()
        self._score_s = 0.0

    def gauges(self) -> dict[str, float]:
        """Cumulative: `scored_groups`, `failed_groups`, `evaluations` (completions), `score_s` (summed over calls)."""
        counts = {key: self._counts[key] for key in ("scored_groups", "failed_groups", "evaluations")}
        return counts | {"score_s": self._score_s}

    def for_lease(self, lease: Lease, on_started: Callable[[Lease, int], None]) -> Job:
        """The job of a lease. `on_started` gets the lease and the version that sampled its first token."""
        request = Request(
            prompt_ids=lease.prompt.token_ids,
            seeds=[sample_seed(lease.seed, sample) for sample in range(lease.group_size)],
            sampling=self._sampling,
            on_sample_done=self._on_room,
        )
        job = Job(lease, [request], num_starting=lease.group_size)

        def started(version: int) -> None:
            job.started_at, job.started_version = time.monotonic(), version
            on_started(lease, version)

        request.on_started = started
        return job

    def for_evaluation(self, evaluation: EvalRequest) -> Job:
        """The job of an evaluation. The samples of a prompt are one request to the engine: they share its prefill."""
        requests = [
            Request(
                prompt_ids=prompt.token_ids,
                seeds=[eval_seed(evaluation.seed, prompt.prompt_id, sample) for sample in evaluation.samples],
                sampling=evaluation.sampling,
                urgent=True,
                on_sample_done=self._on_room,
            )
            for prompt in evaluation.prompts
        ]
        return Job(evaluation, requests, num_starting=evaluation.num_sequences)

    async def complete(self, job: Job) -> Outgoing:
        """The answer to the job. Raises EngineError, VerdictError, RunError."""
        if isinstance(job.source, Lease):
            return await self._complete_lease(job, job.source)
        return await self._complete_evaluation(job, job.source)

    async def _complete_lease(self, job: Job, lease: Lease) -> Outgoing:
        samples = await self._generate(job, job.requests[0])
        job.all_sampled = True
        generate_s = time.monotonic() - job.started_at
        try:
            scores = await self._score_samples(lease.prompt, samples, lease.seed)
        except RewardError as error:
            log.warning("prompt %d failed: %s", lease.prompt.prompt_id, error)
            self._counts["failed_groups"] += 1
            return GroupFailed(lease_id=lease.lease_id, reason=str(error)), ()
        self._counts["scored_groups"] += 1
        group, payload = build_group(
            lease, self._worker, samples, scores, generate_s, overlong_filter=self._overlong_filter
        )
        return GroupDone(group=group), payload.frames()

    async def _complete_evaluation(self, job: Job, evaluation: EvalRequest) -> Outgoing:
        async with asyncio.TaskGroup() as prompts:
            tasks = [
                prompts.create_task(self._answer(job, evaluation.samples, prompt, request))
                for prompt, request in zip(evaluation.prompts, job.requests, strict=True)
            ]
        answers = [answer for task in tasks for answer in task.result()]
        self._counts["evaluations"] += len(answers)
        return pack_answers(evaluation.request_id, answers)

    async def _answer(self, job: Job, numbers: Sequence[int], prompt: Prompt, request: Request) -> list[EvalAnswer]:
        """The answers for one prompt. Each sample is scored by itself. If the reward function raises on one, it counts
        as wrong and doesn't affect the others."""
        samples = await self._generate(job, request)
        scores = await asyncio.gather(*map(partial(self._score_answer, prompt), samples, request.seeds))
        return [
            build_answer(prompt, number, sample, score, self._decode(sample.token_ids))
            for number, sample, score in zip(numbers, samples, scores, strict=True)
        ]

    async def _score_answer(self, prompt: Prompt, sample: Sample, seed: int) -> Score | RewardError:
        try:
            [score] = await self._score_samples(prompt, [sample], seed)
        except RewardError as error:
            log.warning("an answer to held-out prompt %d counts as wrong: %s", prompt.prompt_id, error)
            return error
        return score

    async def _generate(self, job: Job, request: Request) -> list[Sample]:
        async with self._turn:
            job.num_starting -= len(request.seeds)
            return await self._engine.generate(request)

    async def _score_samples(self, prompt: Prompt, samples: Sequence[Sample], seed: int) -> list[Score]:
        token_ids = [sample.token_ids for sample in samples]
        finish_reasons: list[FinishReason] = [sample.finish_reason for sample in samples]
        start = time.monotonic()
        try:
            return await self._score(prompt, token_ids, finish_reasons, seed)
        finally:
            self._score_s += time.monotonic() - start
