"""Agents: programs that call the model by themselves, as often and with whatever they like.

    run(row, base_url, api_key) ──calls──▶ endpoint ──▶ attempt ──▶ engine
                                ──▶ reward, metrics

In: an attempt; the session in which the program runs. Out: an `Episode`, with a context for each history that the
program made. The time of the program is counted while none of its calls is under way. Does not own: calls (`endpoint`),
the program's process and its faults (the session).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

from asyncdapo.errors import EpisodeError, EpisodeOver
from asyncdapo.messages import FinishReason, Limit
from asyncdapo.rollout.endpoint.endpoint import Endpoint
from asyncdapo.rollout.episodes import Episode
from asyncdapo.rollout.several_turns.attempt import Attempt


class Session(Protocol):
    """The process in which the program runs."""

    async def run(
        self, base_url: str, api_key: str, excuse: Callable[[], Limit | None]
    ) -> tuple[float, dict[str, float]]:
        """The program's reward and metrics. `excuse`: the limit because of which the latest call was refused; a program
        that raises then has reached its end. Raises EpisodeOver for that, and for one that takes too long."""
        ...

    def set_busy(self, busy: bool) -> None:
        """Whether the model works for the program; that isn't the program's time."""
        ...


class Agents:
    """Plays episodes with programs of the user's."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def gauges(self) -> dict[str, float]:
        return self._endpoint.gauges()

    async def play(self, attempt: Attempt, session: Session) -> Episode:
        """Raises EpisodeError."""
        with ExitStack() as waits:
            waits.enter_context(attempt.in_environment())

            def on_busy(busy: bool) -> None:
                session.set_busy(busy)
                if busy:
                    waits.close()
                else:
                    waits.enter_context(attempt.in_environment())

            async with self._endpoint.session(attempt, on_busy) as key:
                reward, metrics = 0.0, {}
                finish_reason: FinishReason
                try:
                    reward, metrics = await session.run(f"{self._endpoint.url}/v1", key, lambda: attempt.limit)
                    finish_reason = attempt.limit or "stop"
                except EpisodeOver as over:
                    finish_reason = over.finish_reason
        if not attempt.num_turns:
            how = "took too long, twice," if finish_reason == "time" else "ended"
            raise EpisodeError(f"run: {how} without any answer of the model")
        return attempt.episode(finish_reason, reward, metrics)
