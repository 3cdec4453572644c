"""Makes jobs of leases and evaluation requests, and completes them.

In: leases and evaluation requests; sampled episodes and their scores. Out: `GroupDone` with its payload, `GroupFailed`
if the reward function or the environment failed, `EvalDone`. Does not own: tasks, sockets, credits, turns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from asyncdapo.errors import EpisodeError, RewardError
from asyncdapo.eval_messages import EvalAnswer, EvalRequest
from asyncdapo.messages import GroupDone, GroupFailed, Lease, Message, Prompt, Score
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.episodes import Decode, Episode, Rollouts
from asyncdapo.rollout.groups import build_answer, build_failure, build_group
from asyncdapo.rollout.job import Job
from asyncdapo.rollout.partials import unpack
from asyncdapo.seeds import eval_seed, sample_seed
from asyncdapo.transport.codec import Buffer
from asyncdapo.transport.payload import pack_answers

Outgoing = tuple[Message, Sequence[Buffer]]

log = logging.getLogger("rollout")


class Jobs:
    """Makes jobs and completes them."""

    def __init__(
        self,
        worker: int,
        config: RolloutConfig,
        rollouts: Rollouts,
        decode: Decode,
        on_room: Callable[[], None],
        *,
        overlong_filter: bool = False,
    ) -> None:
        """`on_room` is called whenever a sequence is complete. `overlong_filter`: see `groups.loss_mask`."""
        self._worker, self._rollouts, self._on_room = worker, rollouts, on_room
        self._decode = decode
        self._overlong_filter = overlong_filter
        self._sampling = config.sampling(config.max_response_length)
        self._counts: Counter[str] = Counter()
        self._score_s = 0.0

    def gauges(self) -> dict[str, float]:
        """Cumulative: `scored_groups`, `failed_groups`, `evaluations` (completions), `score_s` (summed over calls)."""
        counts = {key: self._counts[key] for key in ("scored_groups", "failed_groups", "evaluations")}
        return counts | {"score_s": self._score_s} | self._rollouts.gauges()

    def for_lease(self, lease: Lease, on_started: Callable[[Lease, int], None], frames: Sequence[Buffer] = ()) -> Job:
        """The job of a lease. `on_started` gets the lease and the version that sampled its first token. `frames`: what
        is sampled of it already."""
        job = Job(lease, lease.group_size, self._on_room, partial(on_started, lease), unpack(frames))
        job.saved_at = time.monotonic()
        return job

    def for_evaluation(self, evaluation: EvalRequest) -> Job:
        """The job of an evaluation."""
        return Job(evaluation, evaluation.num_sequences, self._on_room)

    async def complete(self, job: Job) -> Outgoing:
        """The answer to the job. Raises EngineError, VerdictError, RunError."""
        if isinstance(job.source, Lease):
            return await self._complete_lease(job, job.source)
        return await self._complete_evaluation(job, job.source)

    async def _complete_lease(self, job: Job, lease: Lease) -> Outgoing:
        seeds = [sample_seed(lease.seed, sample) for sample in range(lease.group_size)]
        try:
            episodes = await self._rollouts.sample(job, lease.prompt, seeds, self._sampling)
            job.all_sampled = True
            generate_s = 0.0 if job.started_version is None else time.monotonic() - job.started_at
            scores = await self._score(lease.prompt, episodes, lease.seed)
        except (EpisodeError, RewardError) as error:
            log.warning("prompt %d failed: %s", lease.prompt.prompt_id, error)
            self._counts["failed_groups"] += 1
            return GroupFailed(lease_id=lease.lease_id, reason=str(error)), ()
        job.scored = True
        self._counts["scored_groups"] += 1
        group, payload = build_group(
            lease, self._worker, episodes, scores, generate_s, overlong_filter=self._overlong_filter
        )
        return GroupDone(group=group), payload.frames()

    async def _complete_evaluation(self, job: Job, evaluation: EvalRequest) -> Outgoing:
        async with asyncio.TaskGroup() as prompts:
            tasks = [prompts.create_task(self._answer(job, evaluation, prompt)) for prompt in evaluation.prompts]
        answers = [answer for task in tasks for answer in task.result()]
        self._counts["evaluations"] += len(answers)
        return pack_answers(evaluation.request_id, answers)

    async def _answer(self, job: Job, evaluation: EvalRequest, prompt: Prompt) -> list[EvalAnswer]:
        """The answers for one prompt. Each sample is scored by itself. If its environment or the reward function fails
        on one, it counts as wrong and doesn't affect the others."""
        seeds = [eval_seed(evaluation.seed, prompt.prompt_id, sample) for sample in evaluation.samples]
        episodes = await self._rollouts.sample_each(job, prompt, seeds, evaluation.sampling)
        answers = (
            self._answer_of(prompt, number, episode, seed)
            for number, episode, seed in zip(evaluation.samples, episodes, seeds, strict=True)
        )
        return await asyncio.gather(*answers)

    async def _answer_of(self, prompt: Prompt, number: int, episode: Episode | EpisodeError, seed: int) -> EvalAnswer:
        if isinstance(episode, EpisodeError):
            log.warning("an answer to held-out prompt %d counts as wrong: %s", prompt.prompt_id, episode)
            return build_failure(prompt, number, episode, self._rollouts.version)
        score: Score | RewardError
        try:
            [score] = await self._score(prompt, [episode], seed)
        except RewardError as error:
            log.warning("an answer to held-out prompt %d counts as wrong: %s", prompt.prompt_id, error)
            score = error
        return build_answer(prompt, number, episode, score, self._decode)

    async def _score(self, prompt: Prompt, episodes: Sequence[Episode], seed: int) -> list[Score]:
        start = time.monotonic()
        try:
            return await self._rollouts.score(prompt, episodes, seed)
        finally:
            self._score_s += time.monotonic() - start
