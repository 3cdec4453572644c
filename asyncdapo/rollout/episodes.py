"""Episodes: what the model reads and writes until a completion has its end.

    Rollouts       what samples and scores the completions of a prompt: `SingleTurn`, or `several_turns`
    Episode        a completion with its tokens, context after context, turn after turn; that of a single response has
                   one of each

In: prompts, the engine's samples. Out: an `Episode` for each seed, and its score. Does not own: jobs, records.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from msgspec.structs import replace

from asyncdapo.errors import EpisodeError
from asyncdapo.eval_messages import Sampling
from asyncdapo.messages import FinishReason, Prompt, Score
from asyncdapo.rollout.engine import Continuable, Engine, Priority, Request, Sample, Sampled
from asyncdapo.rollout.job import Job, Part
from asyncdapo.transport.payload import TOKEN_DTYPE, checksum

AHEAD = 16
"""For so many slots one sequence more is asked for. It waits in the engine, so that a slot is filled when it becomes
free, and not when a lease has come."""

Scorer = Callable[[Prompt, Sequence[np.ndarray], Sequence[FinishReason], int], Awaitable[list[Score]]]
"""(prompt, token ids of each completion, finish reasons, seed) -> a score for each, with `acc` among its metrics.
Raises RewardError if the user's reward function raised, VerdictError if it returned something that isn't a verdict."""

Decode = Callable[[np.ndarray], str]
"""Token ids int32 [T] -> text without special tokens."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One response, and what the model had read since the one before in its context."""

    number: int
    """In its episode, from 0, in the order in which the engine answered."""
    observed: Sequence[int] = ()
    sample: Sample
    checksum: int
    """Of all that the engine has read and sampled, and of the turn's number (`SampledTurn`)."""


@dataclass(frozen=True, kw_only=True)
class SampledContext:
    """What the model has read and written, turn after turn. It has at least one turn."""

    rooted: bool = True
    """Whether it begins behind the prompt. If not, the first turn's observed tokens are its beginning."""
    turns: Sequence[Turn]

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [T]: all of its tokens, sampled and observed."""
        parts = [part for turn in self.turns for part in (np.array(turn.observed, np.int32), turn.sample.token_ids)]
        return np.concatenate(parts, dtype=np.int32)

    @property
    def num_sampled_tokens(self) -> int:
        return sum(len(turn.sample.token_ids) for turn in self.turns)


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One attempt at a prompt. It has at least one context."""

    contexts: Sequence[SampledContext]
    """More than one where it forked."""
    finish_reason: FinishReason
    reward: float = 0.0
    """Sum of the environment's rewards."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The environment's own."""

    @property
    def turns(self) -> list[Turn]:
        """Context after context."""
        return [turn for context in self.contexts for turn in context.turns]

    @property
    def num_sampled_tokens(self) -> int:
        return sum(context.num_sampled_tokens for context in self.contexts)

    @property
    def timed_out(self) -> bool:
        """A step took too long: the episode counts as wrong."""
        return self.finish_reason == "time"


def turn_of(prompt_ids: Sequence[int], sample: Sample, number: int, observed: Sequence[int] = ()) -> Turn:
    """The turn in which the engine answered this prompt. Its checksum is of what the engine was given, not of what is
    put together later."""
    taken = checksum(np.concatenate([np.array(prompt_ids, TOKEN_DTYPE), sample.token_ids]), number)
    return Turn(number=number, observed=observed, sample=sample, checksum=taken)


class Rollouts(Protocol):
    """Samples and scores the completions of a prompt."""

    async def sample(self, job: Job, prompt: Prompt, seeds: Sequence[int], sampling: Sampling) -> list[Episode]:
        """An episode for each seed. Raises EngineError; EpisodeError as soon as one fails."""
        ...

    async def sample_each(
        self, job: Job, prompt: Prompt, seeds: Sequence[int], sampling: Sampling
    ) -> Sequence[Episode | EpisodeError]:
        """The same, but one that fails doesn't affect the others."""
        ...

    async def score(self, prompt: Prompt, episodes: Sequence[Episode], seed: int) -> list[Score]:
        """Raises RewardError, VerdictError."""
        ...

    @property
    def continues(self) -> bool:
        """Whether it can say what is sampled of a job, and continue what another one has sampled (`Job.begun`)."""
        ...

    async def so_far(self, job: Job) -> list[Sampled]:
        """What there is of each sample by now: a `Sample` of each that is complete. Empty if nothing can be said."""
        ...

    @property
    def version(self) -> int:
        """Of the weights that are loaded."""
        ...

    def num_free(self, jobs: Collection[Job]) -> int:
        """Sequences, or episodes, that can begin now beside those of `jobs`, which are all that run."""
        ...

    def gauges(self) -> dict[str, float]:
        """Cumulative counters."""
        ...


class SingleTurn:
    """A completion is one response. The samples of a prompt are one request to the engine: they share its prefill.
    Each one that another worker has begun is a request of its own, for what follows behind its tokens."""

    def __init__(
        self,
        engine: Engine,
        score: Scorer,
        *,
        one_at_a_time: bool = False,
        continues: bool = True,
        account: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """`continues`: what is sampled of a completion is its tokens, log-probs and versions, and no more. `account`:
        cumulative counters of what scores."""
        self._engine, self._score, self._account = engine, score, account
        self._one_at_a_time = one_at_a_time
        self._turn = asyncio.Lock() if one_at_a_time else nullcontext()
        self._continuable = engine if continues and isinstance(engine, Continuable) else None

    @property
    def version(self) -> int:
        return self._engine.loaded_version

    def num_free(self, jobs: Collection[Job]) -> int:
        """Slots and places to wait that no sequence has. One at a time: some if nothing runs, enough for a group."""
        if self._one_at_a_time:
            return not jobs
        num_wanted = self._engine.num_slots + self._engine.num_slots // AHEAD
        return num_wanted - self._engine.num_outstanding - sum(job.num_starting for job in jobs)

    @property
    def continues(self) -> bool:
        return self._continuable is not None

    def gauges(self) -> dict[str, float]:
        return self._account()

    async def sample(self, job: Job, prompt: Prompt, seeds: Sequence[int], sampling: Sampling) -> list[Episode]:
        begun = job.begun or [Sampled()] * len(seeds)
        samples = {index: one for index, one in enumerate(begun) if isinstance(one, Sample)}
        parts = job.parts = _parts(prompt, seeds, begun, sampling)
        for part in parts:
            part.request.on_sample_done = job.note_done
            job.send(part.request)
        async with self._turn:
            job.skip(len(samples))
            await self._make(job, parts)
        for part in parts:
            samples |= {index: begun[index].then(one) for index, one in zip(part.indices, part.samples, strict=True)}
        return [_episode(prompt, samples[index]) for index in range(len(seeds))]

    sample_each = sample
    """No episode of a single turn fails."""

    async def _make(self, job: Job, parts: Sequence[Part]) -> None:
        """Have each part sampled. If one fails, the others are given up."""

        async def make(part: Part) -> None:
            job.num_starting -= len(part.indices)
            part.samples = await self._engine.generate(part.request)

        if len(parts) == 1:
            return await make(parts[0])
        tasks = [asyncio.ensure_future(make(part)) for part in parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def so_far(self, job: Job) -> list[Sampled]:
        if self._continuable is None:
            return []
        found = list(job.begun) or [Sampled()] * sum(len(part.indices) for part in job.parts)
        for part in job.parts:
            part.request.handed_back = job.handed_back
            more = await self._continuable.so_far(part.request)
            for index, sampled in zip(part.indices, part.samples or more, strict=False):
                found[index] = found[index].then(sampled)
        return found

    async def score(self, prompt: Prompt, episodes: Sequence[Episode], seed: int) -> list[Score]:
        samples = [episode.turns[0].sample for episode in episodes]
        token_ids = [sample.token_ids for sample in samples]
        return await self._score(prompt, token_ids, [sample.finish_reason for sample in samples], seed)


def _parts(prompt: Prompt, seeds: Sequence[int], begun: Sequence[Sampled], sampling: Sampling) -> list[Part]:
    """The requests for what is missing of these samples."""
    fresh = [index for index, one in enumerate(begun) if not len(one.token_ids)]
    continued = [[index] for index, one in enumerate(begun) if len(one.token_ids) and not isinstance(one, Sample)]
    parts: list[Part] = []
    for indices in ([fresh] if fresh else []) + continued:
        before = begun[indices[0]].token_ids.tolist()
        request = Request(
            prompt_ids=[*prompt.token_ids, *before],
            seeds=[seeds[index] for index in indices],
            sampling=replace(sampling, max_tokens=sampling.max_tokens - len(before)),
            num_begun=len(before),
            priority=Priority.CONTINUATION if before else Priority.FRESH,
        )
        parts.append(Part(request, indices))
    return parts


def _episode(prompt: Prompt, sample: Sample) -> Episode:
    context = SampledContext(turns=[turn_of(prompt.token_ids, sample, 0)])
    return Episode(contexts=[context], finish_reason=sample.finish_reason)
