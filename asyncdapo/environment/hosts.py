"""Hosts: the environments of a worker's episodes, in processes that can be killed.

    in_environment(row, play) ──seat──▶ play(session): reset, step, step, … ──▶ what `play` returns

    a call takes too long      host killed; the episode begins again, alone in a fresh host; the second time `step`
                               raises EpisodeOver("time"), and the episode counts as wrong
    the host dies in a call    the same; the second time EpisodeError, which fails the group
    raises                     the episode begins again, `environment.retries` times; then EpisodeError
    breaks the contract        EpisodeError: it would do so again
    another episode is at      the episode begins again, as often as it takes
      fault for the host's end
    can't be started           a few tries in a row (`child/place`); then RunError, which ends the worker

`reset` over time is the environment's fault, since the model has said nothing yet: EpisodeError the second time.

Invariant: an episode that ends, however it ends, leaves no environment in a host. Start, use and stop it in one event
loop. Does not own: tokens, turns (rollout), rewards' scale (the scorer).
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from asyncdapo.child.place import Place
from asyncdapo.environment.clock import Clock
from asyncdapo.environment.config import CONCURRENCY, NUM_TRIES, EnvironmentConfig
from asyncdapo.environment.host import KIND, Answer, Call, HostProcess, HostSetup, NoAnswer, log
from asyncdapo.errors import EpisodeError, EpisodeOver, RunError
from asyncdapo.messages import Limit, Text
from asyncdapo.model.tool_calls import ToolCall, Tools

CHARS_PER_TOKEN = 32
"""A text with more characters for each token of a full context can't fit it, and isn't sent."""

T = TypeVar("T")
Row = dict[str, Any]
Play = Callable[["Session"], Awaitable[T]]
Excuse = Callable[[], Limit | None]
"""The limit that a program which raises has run into; None: it has no excuse."""


class _BeginAgainError(Exception):
    """The episode has lost its environment, or may be tried again."""


@dataclass
class _Faults:
    """What an episode has done so far to the hosts that it was in."""

    num_slow: int = 0
    num_died: int = 0
    num_raised: int = 0

    @property
    def suspect(self) -> bool:
        return bool(self.num_slow or self.num_died)


class Session:
    """The environment of one attempt at an episode."""

    def __init__(
        self, host: HostProcess, number: int, row: Row, config: EnvironmentConfig, faults: _Faults, counts: Counter[str]
    ) -> None:
        self._host, self._number, self._row, self._config = host, number, row, config
        self._faults, self._counts = faults, counts
        self._clock = Clock(config.step_timeout_s, config.max_seconds)

    @property
    def tools(self) -> Tools:
        """JSON schemas of what the model may call."""
        return self._host.tools

    async def reset(self) -> Text | None:
        """What the model reads first; None is the row's prompt."""
        answer = await self._call("reset", self._row)
        if answer.num_chars:
            raise EpisodeError(f"reset: {answer.num_chars:,} characters don't fit environment.max_context")
        return answer.observation

    async def step(self, response: str) -> tuple[Text | None, float]:
        """Observation (None at the end) and reward. Raises EpisodeOver: `time`, or `length` for an observation that no
        context has room for."""
        answer = await self._call("step", response)
        if answer.num_chars:
            raise EpisodeOver("length", answer.reward)
        return answer.observation, answer.reward

    async def use_tools(self, calls: Sequence[ToolCall]) -> Text:
        """What they say, a message for each. Raises EpisodeOver as `step`."""
        answer = await self._call("tools", calls)
        if answer.num_chars:
            raise EpisodeOver("length")
        assert answer.observation is not None, "a call has an answer"
        return answer.observation

    async def end(self) -> tuple[dict[str, float], float]:
        """The environment's metrics, and the reward that it gives at the end."""
        answer = await self._call("end", None)
        return answer.metrics, answer.reward

    async def run(self, base_url: str, api_key: str, excuse: Excuse) -> tuple[float, dict[str, float]]:
        """Reward and metrics of a program that calls the model by itself. Raises EpisodeOver: `time`, or what `excuse`
        gives for a program that raises."""
        given = {"row": self._row, "base_url": base_url, "api_key": api_key}
        answer = await self._call("run", given, excuse)
        return answer.reward, answer.metrics

    def set_busy(self, busy: bool) -> None:
        """Whether the model works for the program, which takes none of its time."""
        if busy:
            self._clock.stand_still()
        else:
            self._clock.go_on()

    async def _call(self, do: Call, given: Any, excuse: Excuse = lambda: None) -> Answer:
        answer = await self._host.call(self._number, do, given, self._clock)
        if isinstance(answer, NoAnswer):
            raise self._without_answer(do, answer)
        if answer.broke:
            raise EpisodeError(answer.broke)
        if answer.raised:
            if reached := excuse():
                raise EpisodeOver(reached)
            self._faults.num_raised += 1
            if self._faults.num_raised > self._config.retries:
                raise EpisodeError(answer.raised)
            raise _BeginAgainError
        self._counts["calls"] += 1
        return answer

    def _without_answer(self, do: Call, answer: NoAnswer) -> Exception:
        faults = self._faults
        faults.num_slow += answer.fault == "slow"
        faults.num_died += answer.fault == "died"
        if answer.fault == "none" or faults.num_slow + faults.num_died < NUM_TRIES:
            return _BeginAgainError()
        if answer.fault == "slow" and do in ("step", "tools", "run"):
            self._counts["timeouts"] += 1
            log.warning("an episode counts as wrong: a step took too long, the second time alone in a host")
            return EpisodeOver("time")
        limits = f"environment.step_timeout_s {self._config.step_timeout_s:g}, max_seconds {self._config.max_seconds:g}"
        what = f"took too long ({limits})" if answer.fault == "slow" else "ended its process"
        return EpisodeError(f"{do}: {what}, the second time alone in a host")


@dataclass
class _Seats:
    """The episodes in one host after another."""

    place: Place[HostProcess]
    num_taken: int = 0


class Hosts:
    """A fixed number of hosts, and one more while an episode is alone."""

    def __init__(self, config: EnvironmentConfig, max_context: int, tokenizer: str = "") -> None:
        """`max_context`, in tokens: `environment.max_context` in force. `tokenizer`: where the model's is, for programs
        that make its tokens."""
        assert config.path is not None, "no hosts without an environment"
        self._config = config
        self._setup = HostSetup(
            path=config.path,
            python=config.python,
            tokenizer=tokenizer,
            concurrency=config.concurrency or CONCURRENCY,
            max_chars=CHARS_PER_TOKEN * max_context,
        )
        self._seats = [_Seats(self._place()) for _ in range(config.processes)]
        self._lone = self._place()
        self._alone = asyncio.Lock()
        self._num_suspects = 0
        """Episodes that are alone, one after the other, or wait for that."""
        self._numbers = itertools.count()
        self._counts: Counter[str] = Counter()

    async def start(self) -> None:
        """Start every host. If one can't start, ends all of them and raises RunError."""
        ready = await asyncio.gather(*(seats.place.process() for seats in self._seats), return_exceptions=True)
        for error in ready:
            if isinstance(error, BaseException):
                await self.stop()
                raise error

    async def stop(self) -> None:
        """End every host; returns when they are gone."""
        await asyncio.gather(*(place.close() for place in self._places))

    def pids(self) -> list[int]:
        """Pids of the live hosts."""
        return [place.current.pid for place in self._places if place.current and place.current.alive]

    def gauges(self) -> dict[str, float]:
        """Cumulative: `environment_timeouts`, episodes that count as wrong because a step took too long;
        `environment_repeats`, attempts that were given up and begun again; `host_restarts`, hosts replaced for a
        fault."""
        return {
            "environment_timeouts": self._counts["timeouts"],
            "environment_repeats": self._counts["repeats"],
            "host_restarts": sum(place.num_restarts for place in self._places),
        }

    @property
    def tools(self) -> Tools:
        """JSON schemas of what the model may call, once started."""
        [host, *_] = [seats.place.current for seats in self._seats if seats.place.current is not None]
        return host.tools

    @property
    def num_calls(self) -> int:
        """Answers of environments so far. It rises while they make progress."""
        return self._counts["calls"]

    async def in_environment(self, row: Row, play: Play[T]) -> T:
        """What `play` returns, with the environment of this row. An attempt that is given up leaves no trace: `play` is
        called anew. Raises EpisodeError if the environment fails, RunError if no host can be started."""
        faults = _Faults()
        while True:
            async with self._seat(alone=faults.suspect) as host:
                number = next(self._numbers)
                try:
                    return await play(Session(host, number, row, self._config, faults, self._counts))
                except _BeginAgainError:
                    self._counts["repeats"] += 1
                finally:
                    host.forget(number)

    @asynccontextmanager
    async def _seat(self, *, alone: bool) -> AsyncIterator[HostProcess]:
        if alone:
            self._num_suspects += 1
            try:
                async with self._alone:
                    yield await self._lone.process()
                    self._lone.note_work()
            finally:
                self._num_suspects -= 1
                if not self._num_suspects:
                    await self._lone.empty()
            return
        seats = min(self._seats, key=lambda seats: seats.num_taken)
        seats.num_taken += 1
        try:
            yield await seats.place.process()
            seats.place.note_work()
        finally:
            seats.num_taken -= 1

    def _place(self) -> Place[HostProcess]:
        async def start() -> HostProcess:
            try:
                return await HostProcess.start(self._setup)
            except RunError as error:
                raise RunError(f"environment {self._setup.path!r}: {error}") from error

        return Place(KIND, start, log)

    @property
    def _places(self) -> list[Place[HostProcess]]:
        return [*(seats.place for seats in self._seats), self._lone]
