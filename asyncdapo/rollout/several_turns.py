"""Episodes of several turns: the engine and an environment take turns.

    prompt ──engine──▶ response ──step──▶ observation ──engine──▶ response ──step──▶ … ──▶ None, with the rewards

In: prompts, the engine's samples, what environments say. Out: an `Episode` for each seed. Invariants: a token that was
sampled is never made from text again; each turn's prompt is all that was read and sampled before, and the observation;
an episode ends in a sampled token. After an update of the weights, the next turn reads the whole context anew. Does not
own: the environments' processes and their faults (`Environments`), how text becomes tokens (`TurnEncoder`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from msgspec.structs import replace

from asyncdapo.errors import EpisodeError, EpisodeOver
from asyncdapo.messages import FinishReason, Prompt, Sampling, Score, Text
from asyncdapo.rollout.engine import Engine, Priority, Request, Sample
from asyncdapo.rollout.episodes import Decode, Episode, Turn, turn_of
from asyncdapo.rollout.job import Job
from asyncdapo.seeds import sample_seed

Rate = Callable[[Sequence[Episode], int], list[Score]]
"""(episodes of a group, seed) -> a score for each, from its rewards."""
T = TypeVar("T")


class Session(Protocol):
    """The environment of one attempt at an episode."""

    async def reset(self) -> Text | None:
        """What the model reads first; None is the row's prompt."""
        ...

    async def step(self, response: str) -> tuple[Text | None, float]:
        """Observation, None at the end, and reward. Raises EpisodeOver."""
        ...

    async def end(self) -> dict[str, float]:
        """The environment's metrics."""
        ...


class Environments(Protocol):
    """Gives each episode its environment."""

    async def in_environment(self, row: dict[str, Any], play: Callable[[Session], Awaitable[T]]) -> T:
        """What `play` returns. `play` is called again if the attempt is given up. Raises EpisodeError."""
        ...

    def gauges(self) -> dict[str, float]:
        """Cumulative counters."""
        ...


class TurnEncoder(Protocol):
    """Tokens of what an environment says. Raises EpisodeError for messages without a chat template."""

    def begin(self, text: Text) -> list[int]:
        """A whole prompt."""
        ...

    def observe(self, text: Text) -> list[int]:
        """What follows a response, up to where the model writes again."""
        ...


@dataclass(frozen=True, kw_only=True)
class TurnLimits:
    """Limits of an episode."""

    max_turns: int
    max_context: int
    """Tokens, the prompt included."""


class SeveralTurns:
    """A completion is an episode in an environment. Each of its turns is a request to the engine."""

    def __init__(
        self,
        engine: Engine,
        environments: Environments,
        rate: Rate,
        encoder: TurnEncoder,
        decode: Decode,
        limits: TurnLimits,
        oversubscribe: float,
    ) -> None:
        """`oversubscribe`: episodes under way as a multiple of the engine's slots."""
        self._engine, self._environments, self._rate = engine, environments, rate
        self._encoder, self._decode = encoder, decode
        self._limits, self._oversubscribe = limits, oversubscribe
        self._counts: Counter[str] = Counter()
        self._environment_s = 0.0

    @property
    def version(self) -> int:
        return self._engine.loaded_version

    @property
    def num_seats(self) -> int:
        return int(self._engine.num_slots * self._oversubscribe)

    def gauges(self) -> dict[str, float]:
        """Cumulative: `turns` sampled, `observed_tokens`, `environment_s` (summed over calls, waits included)."""
        counts = {key: self._counts[key] for key in ("turns", "observed_tokens")}
        return counts | {"environment_s": self._environment_s} | self._environments.gauges()

    async def sample(
        self, job: Job, prompt: Prompt, seeds: Sequence[int], sampling: Sampling, priority: Priority
    ) -> list[Episode]:
        """If an episode fails, the others are given up."""
        tasks = [asyncio.create_task(self._episode(job, prompt, seed, sampling, priority)) for seed in seeds]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def sample_each(
        self, job: Job, prompt: Prompt, seeds: Sequence[int], sampling: Sampling, priority: Priority
    ) -> Sequence[Episode | EpisodeError]:
        """Those that fail are given as their errors."""

        async def one(seed: int) -> Episode | EpisodeError:
            try:
                return await self._episode(job, prompt, seed, sampling, priority)
            except EpisodeError as error:
                return error

        return await asyncio.gather(*map(one, seeds))

    async def score(self, prompt: Prompt, episodes: Sequence[Episode], seed: int) -> list[Score]:
        return self._rate(episodes, seed)

    async def _episode(self, job: Job, prompt: Prompt, seed: int, sampling: Sampling, priority: Priority) -> Episode:
        async def play(session: Session) -> Episode:
            attempt = _Attempt(job, prompt, seed, sampling, priority)
            finish_reason = await self._play(attempt, session)
            if not attempt.turns:
                problem = f"{len(attempt.context) + len(attempt.observed)} tokens to begin with"
                raise EpisodeError(f"reset: gave {problem}, environment.max_context is {self._limits.max_context}")
            metrics = {} if finish_reason == "time" else await self._asked(job, session.end())
            return attempt.episode(finish_reason, metrics)

        job.num_starting -= 1
        row = {"prompt": prompt.text, "answer": prompt.answer, "source": prompt.source, "row": prompt.row}
        try:
            return await self._environments.in_environment(row, play)
        except EpisodeError as error:
            where = f"{prompt.source} row {prompt.row} (prompt {prompt.prompt_id})"
            raise EpisodeError(f"the environment failed on {where}: {error}") from error
        finally:
            job.note_done()

    async def _play(self, attempt: _Attempt, session: Session) -> FinishReason:
        """Turn after turn, up to the attempt's end. Returns why it ended."""
        said = await self._asked(attempt.job, session.reset())
        if said is not None:
            attempt.rooted, attempt.context, attempt.observed = False, [], self._encoder.begin(said)
        while len(attempt.turns) < self._limits.max_turns:
            room = attempt.room(self._limits.max_context)
            if room < 1:
                return "length"
            request = attempt.request(room)
            [sample] = await self._engine.generate(request)
            self._counts.update(turns=1, observed_tokens=len(attempt.observed))
            attempt.take(request, sample)
            if sample.finish_reason == "length":
                return "length"
            try:
                said, reward = await self._asked(attempt.job, session.step(self._decode(sample.token_ids)))
            except EpisodeOver as over:
                attempt.reward += over.reward
                return over.finish_reason
            attempt.reward += reward
            if said is None:
                return "stop"
            attempt.observed = self._encoder.observe(said)
        return "turns"

    async def _asked(self, job: Job, answer: Awaitable[T]) -> T:
        began = time.monotonic()
        job.num_in_environment += 1
        try:
            return await answer
        finally:
            job.num_in_environment -= 1
            self._environment_s += time.monotonic() - began


class _Attempt:
    """An episode under way."""

    def __init__(self, job: Job, prompt: Prompt, seed: int, sampling: Sampling, priority: Priority) -> None:
        self.job = job
        self._seed, self._sampling, self._priority = seed, sampling, priority
        self.rooted = True
        self.context = list(prompt.token_ids)
        """All that the model has read and written."""
        self.observed: list[int] = []
        """What it reads next."""
        self.turns: list[Turn] = []
        self.reward = 0.0
        self._num_left = sampling.max_tokens

    def room(self, max_context: int) -> int:
        """Tokens that the next response may have."""
        return min(self._num_left, max_context - len(self.context) - len(self.observed))

    def request(self, room: int) -> Request:
        """The next turn's."""
        self.context += self.observed
        request = Request(
            prompt_ids=list(self.context),
            seeds=[sample_seed(self._seed, len(self.turns))],
            sampling=replace(self._sampling, max_tokens=room),
            priority=min(self._priority, Priority.CONTINUATION) if self.turns else self._priority,
        )
        return self.job.send(request)

    def take(self, request: Request, sample: Sample) -> None:
        """The turn's response."""
        self.turns.append(turn_of(request, sample, len(self.turns), self.observed))
        self.context += sample.token_ids.tolist()
        self.observed = []
        self._num_left -= len(sample.token_ids)

    def episode(self, finish_reason: FinishReason, metrics: dict[str, float]) -> Episode:
        return Episode(
            turns=self.turns, finish_reason=finish_reason, rooted=self.rooted, reward=self.reward, metrics=metrics
        )
