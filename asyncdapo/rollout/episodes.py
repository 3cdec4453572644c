"""Episodes: what the model reads and writes until a completion has its end.

    Rollouts       what samples and scores the completions of a prompt: `SingleTurn`, or `several_turns`
    Episode        a completion with its tokens, context after context, turn after turn; that of a single response has
                   one of each

In: prompts, the engine's samples. Out: an `Episode` for each seed, and its score. Does not own: jobs, records.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from asyncdapo.errors import EpisodeError
from asyncdapo.messages import FinishReason, Prompt, Sampling, Score
from asyncdapo.rollout.engine import Engine, Priority, Request, Sample
from asyncdapo.rollout.job import Job
from asyncdapo.transport.payload import checksum

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


def turn_of(request: Request, sample: Sample, number: int, observed: Sequence[int] = ()) -> Turn:
    """The turn in which the engine answered the request. Its checksum is of what the engine was given, not of what is
    put together later."""
    taken = checksum([*request.prompt_ids, *sample.token_ids], number)
    return Turn(number=number, observed=observed, sample=sample, checksum=taken)


class Rollouts(Protocol):
    """Samples and scores the completions of a prompt."""

    async def sample(
        self, job: Job, prompt: Prompt, seeds: Sequence[int], sampling: Sampling, priority: Priority
    ) -> list[Episode]:
        """An episode for each seed. Raises EngineError; EpisodeError as soon as one fails."""
        ...

    async def sample_each(
        self, job: Job, prompt: Prompt, seeds: Sequence[int], sampling: Sampling, priority: Priority
    ) -> Sequence[Episode | EpisodeError]:
        """The same, but one that fails doesn't affect the others."""
        ...

    async def score(self, prompt: Prompt, episodes: Sequence[Episode], seed: int) -> list[Score]:
        """Raises RewardError, VerdictError."""
        ...

    @property
    def version(self) -> int:
        """Of the weights that are loaded."""
        ...

    @property
    def num_seats(self) -> int | None:
        """Episodes under way at once; None: as many as the engine has slots for."""
        ...

    def gauges(self) -> dict[str, float]:
        """Cumulative counters."""
        ...


class SingleTurn:
    """A completion is one response. The samples of a prompt are one request to the engine: they share its prefill."""

    def __init__(
        self,
        engine: Engine,
        score: Scorer,
        *,
        one_at_a_time: bool = False,
        account: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """`account`: cumulative counters of what scores."""
        self._engine, self._score, self._account = engine, score, account
        self._turn = asyncio.Lock() if one_at_a_time else nullcontext()

    @property
    def version(self) -> int:
        return self._engine.loaded_version

    @property
    def num_seats(self) -> None:
        return None

    def gauges(self) -> dict[str, float]:
        return self._account()

    async def sample(
        self, job: Job, prompt: Prompt, seeds: Sequence[int], sampling: Sampling, priority: Priority
    ) -> list[Episode]:
        request = Request(
            prompt_ids=prompt.token_ids,
            seeds=list(seeds),
            sampling=sampling,
            priority=priority,
            on_sample_done=job.note_done,
        )
        job.send(request)
        async with self._turn:
            job.num_starting -= len(seeds)
            samples = await self._engine.generate(request)
        turns = [turn_of(request, sample, 0) for sample in samples]
        contexts = [SampledContext(turns=[turn]) for turn in turns]
        return [
            Episode(contexts=[context], finish_reason=sample.finish_reason)
            for context, sample in zip(contexts, samples, strict=True)
        ]

    sample_each = sample
    """No episode of a single turn fails."""

    async def score(self, prompt: Prompt, episodes: Sequence[Episode], seed: int) -> list[Score]:
        samples = [episode.turns[0].sample for episode in episodes]
        token_ids = [sample.token_ids for sample in samples]
        return await self._score(prompt, token_ids, [sample.finish_reason for sample in samples], seed)
