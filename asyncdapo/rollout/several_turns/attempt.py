"""An attempt at an episode: what the engine read and sampled, call by call, and the contexts that this makes.

    sample(prompt_ids) ──engine──▶ a turn. Its prompt repeats a context to the last token: the turn continues it.
                                   Otherwise it begins another context; what that shares with earlier ones is observed

In: the token ids that the model is to read. Out: samples, and the `Episode` at the end. Invariants: tokens and
log-probs are those of the engine; each turn stands in one context, behind exactly the tokens that were read; the
sampled tokens of all turns together are at most `sampling.max_tokens`. Calls may run at the same time: they share that
limit, and one that finds nothing left waits until another ends. Does not own: who decides what is read (`steps`,
`agents`).
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from msgspec.structs import replace

from asyncdapo.errors import EpisodeOver
from asyncdapo.eval_messages import Sampling
from asyncdapo.messages import FinishReason, Limit, Prompt
from asyncdapo.rollout.engine import Engine, Priority, Request, Sample
from asyncdapo.rollout.episodes import Episode, SampledContext, Turn, turn_of
from asyncdapo.rollout.job import Job
from asyncdapo.seeds import sample_seed

Counts = defaultdict[str, float]


@dataclass(frozen=True, kw_only=True)
class TurnLimits:
    """Limits of an episode."""

    max_turns: int
    max_context: int
    """Tokens, the prompt included."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An episode that is wanted: whose it is, and how to sample it."""

    job: Job
    prompt: Prompt
    seed: int
    sampling: Sampling


@dataclass
class _Growing:
    """A context while it grows."""

    rooted: bool
    token_ids: list[int]
    """All that the model has read and written, the group's prompt included."""
    turns: list[Turn]


class Attempt:
    """An episode under way."""

    def __init__(self, engine: Engine, wanted: Wanted, limits: TurnLimits, counts: Counts) -> None:
        """`counts`: of all attempts together."""
        self.wanted = wanted
        self.limit: Limit | None = None
        """The limit that has cut off or refused a call, none having begun since; None: there is none."""
        self._engine, self._limits, self._counts = engine, limits, counts
        self._contexts: list[_Growing] = []
        self._num_left = wanted.sampling.max_tokens
        """Sampled tokens that aren't promised to a call yet."""
        self._num_begun = self._num_running = 0
        """Calls."""
        self._ended = asyncio.Event()
        """A call has ended."""

    @property
    def num_turns(self) -> int:
        return sum(len(context.turns) for context in self._contexts)

    async def sample(self, prompt_ids: list[int], max_tokens: int | None = None) -> Sample:
        """One more turn. `max_tokens`: most that the caller wants. Raises EpisodeOver with the limit that leaves no
        room for it; ValueError for token ids that the model hasn't; EngineError."""
        room = await self._reserve(len(prompt_ids), max_tokens)
        number, num_sampled = self._num_begun, 0
        self._num_begun += 1
        request = self._request(prompt_ids, number, room)
        try:
            [sample] = await self._engine.generate(request)
            num_sampled = len(sample.token_ids)
        finally:
            request.num_running = 0  # a call that was given up makes no progress
            self._num_running -= 1
            self._num_left += room - num_sampled
            self._ended.set()
        self._take(request, sample)
        if sample.finish_reason == "length" and room != max_tokens:
            self.limit = "length"
        return sample

    def episode(self, finish_reason: FinishReason, reward: float, metrics: Mapping[str, float]) -> Episode:
        """What has been sampled."""
        contexts = [SampledContext(rooted=context.rooted, turns=context.turns) for context in self._contexts]
        return Episode(contexts=contexts, finish_reason=finish_reason, reward=reward, metrics=metrics)

    @contextmanager
    def in_environment(self) -> Iterator[None]:
        """While the episode waits for its environment."""
        began = time.monotonic()
        try:
            with self.wanted.job.in_environment():
                yield
        finally:
            self._counts["environment_s"] += time.monotonic() - began

    async def _reserve(self, num_read: int, max_tokens: int | None) -> int:
        """The most tokens that the call may sample, taken from what is left."""
        while self._num_left < 1 and self._num_running:
            self._ended.clear()
            await self._ended.wait()
        room = min(self._num_left, self._limits.max_context - num_read)
        if self._num_begun >= self._limits.max_turns or room < 1:
            self.limit = "turns" if self._num_begun >= self._limits.max_turns else "length"
            raise EpisodeOver(self.limit)
        self.limit = None
        room = min(room, max_tokens or room)
        self._num_left -= room
        self._num_running += 1
        return room

    def _request(self, prompt_ids: list[int], number: int, room: int) -> Request:
        wanted = self.wanted
        request = Request(
            prompt_ids=prompt_ids,
            seeds=[sample_seed(wanted.seed, number)],
            sampling=replace(wanted.sampling, max_tokens=room),
            priority=Priority.CONTINUATION if number else Priority.FRESH,
        )
        return wanted.job.send(request)

    def _take(self, request: Request, sample: Sample) -> None:
        """The turn in its context."""
        read = request.prompt_ids
        repeated = [one for one in self._contexts if read[: len(one.token_ids)] == one.token_ids]
        context = max(repeated, key=lambda one: len(one.token_ids), default=None) or self._begin(read)
        observed = read[len(context.token_ids) :]
        context.turns.append(turn_of(read, sample, self.num_turns, observed))
        context.token_ids = [*read, *sample.token_ids.tolist()]
        self._counts["turns"] += 1
        self._counts["observed_tokens"] += len(observed)

    def _begin(self, read: list[int]) -> _Growing:
        root = self.wanted.prompt.token_ids
        rooted = read[: len(root)] == root
        self._contexts.append(_Growing(rooted, list(root) if rooted else [], []))
        return self._contexts[-1]
