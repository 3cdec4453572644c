"""Episodes of several turns: the engine and an environment make them.

    seeds ──▶ an attempt each ──play──▶ `Episode`      `Steps`: the environment answers each response
                                                       `Agents`: a program of the user's calls the model

In: prompts, what environments say. Out: an `Episode` for each seed. Does not own: the environments' processes and their
faults (`Environments`), tokens and limits (`attempt`).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar

from asyncdapo.errors import EpisodeError
from asyncdapo.eval_messages import Sampling
from asyncdapo.messages import Prompt, Score
from asyncdapo.rollout.engine import Engine, Sampled
from asyncdapo.rollout.episodes import Episode
from asyncdapo.rollout.job import Job
from asyncdapo.rollout.several_turns.attempt import Attempt, Counts, TurnLimits, Wanted

Rate = Callable[[Sequence[Episode], int], list[Score]]
"""(episodes of a group, seed) -> a score for each, from its rewards."""
T = TypeVar("T")


class Environments(Protocol):
    """Gives each episode its environment."""

    async def in_environment(self, row: dict[str, Any], play: Callable[[Any], Awaitable[T]]) -> T:
        """What `play` returns for a session. `play` is called again if the attempt is given up. Raises EpisodeError."""
        ...

    def gauges(self) -> dict[str, float]:
        """Cumulative counters."""
        ...


class Player(Protocol):
    """Plays an episode in its environment."""

    async def play(self, attempt: Attempt, session: Any) -> Episode:
        """Raises EpisodeError, EngineError."""
        ...

    def gauges(self) -> dict[str, float]:
        """Cumulative counters."""
        ...


class SeveralTurns:
    """A completion is an episode in an environment. Each of its turns is a request to the engine."""

    def __init__(
        self,
        engine: Engine,
        environments: Environments,
        player: Player,
        rate: Rate,
        limits: TurnLimits,
        oversubscribe: float,
    ) -> None:
        """`oversubscribe`: episodes under way as a multiple of the engine's slots."""
        self._engine, self._environments, self._player, self._rate = engine, environments, player, rate
        self._limits, self._oversubscribe = limits, oversubscribe
        self._counts: Counts = defaultdict(float)

    @property
    def version(self) -> int:
        return self._engine.loaded_version

    def num_free(self, jobs: Collection[Job]) -> int:
        """Seats that no episode has. It keeps its own while its environment works."""
        return int(self._engine.num_slots * self._oversubscribe) - sum(job.num_unfinished for job in jobs)

    @property
    def continues(self) -> bool:
        """What an environment has done can't be done again elsewhere."""
        return False

    async def so_far(self, job: Job) -> list[Sampled]:
        return []

    def gauges(self) -> dict[str, float]:
        """Cumulative: `turns` sampled, `observed_tokens`, `environment_s` (summed over calls, waits included)."""
        counts = {key: self._counts[key] for key in ("turns", "observed_tokens", "environment_s")}
        return counts | self._player.gauges() | self._environments.gauges()

    async def sample(self, job: Job, prompt: Prompt, seeds: Sequence[int], sampling: Sampling) -> list[Episode]:
        """If an episode fails, the others are given up."""
        tasks = [asyncio.create_task(self._episode(job, prompt, seed, sampling)) for seed in seeds]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def sample_each(
        self, job: Job, prompt: Prompt, seeds: Sequence[int], sampling: Sampling
    ) -> Sequence[Episode | EpisodeError]:
        """Those that fail are given as their errors."""

        async def one(seed: int) -> Episode | EpisodeError:
            try:
                return await self._episode(job, prompt, seed, sampling)
            except EpisodeError as error:
                return error

        return await asyncio.gather(*map(one, seeds))

    async def score(self, prompt: Prompt, episodes: Sequence[Episode], seed: int) -> list[Score]:
        return self._rate(episodes, seed)

    async def _episode(self, job: Job, prompt: Prompt, seed: int, sampling: Sampling) -> Episode:
        wanted = Wanted(job=job, prompt=prompt, seed=seed, sampling=sampling)

        async def play(session: Any) -> Episode:
            return await self._player.play(Attempt(self._engine, wanted, self._limits, self._counts), session)

        job.num_starting -= 1
        row = {"prompt": prompt.text, "answer": prompt.answer, "source": prompt.source, "row": prompt.row}
        try:
            return await self._environments.in_environment(row, play)
        except EpisodeError as error:
            where = f"{prompt.source} row {prompt.row} (prompt {prompt.prompt_id})"
            raise EpisodeError(f"the environment failed on {where}: {error}") from error
        finally:
            job.note_done()
