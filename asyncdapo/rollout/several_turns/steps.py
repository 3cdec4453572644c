"""Steps: the model and an environment take turns.

    prompt ──engine──▶ response ──step──▶ observation ──engine──▶ response ──step──▶ … ──▶ None, with the rewards
                                ──tools──▶ results, for a response that calls any

In: an attempt, what its environment says. Out: an `Episode` of one context. Invariants: a token that was sampled is
never made from text again; each turn's prompt is all that was read and sampled before, and the observation; an episode
ends in a sampled token. After an update of the weights, the next turn reads the whole context anew. Does not own: how
text becomes tokens (`TurnEncoder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from asyncdapo.errors import EpisodeError, EpisodeOver
from asyncdapo.messages import FinishReason, Text
from asyncdapo.model.tool_calls import ToolCall, Tools
from asyncdapo.rollout.episodes import Decode, Episode
from asyncdapo.rollout.several_turns.attempt import Attempt


class Session(Protocol):
    """The environment of one attempt at an episode."""

    @property
    def tools(self) -> Tools:
        """What the model may call."""
        ...

    async def reset(self) -> Text | None:
        """What the model reads first; None is the row's prompt."""
        ...

    async def step(self, response: str) -> tuple[Text | None, float]:
        """Observation, None at the end, and reward. Raises EpisodeOver."""
        ...

    async def use_tools(self, calls: Sequence[ToolCall]) -> Text:
        """What they say. Raises EpisodeOver."""
        ...

    async def end(self) -> tuple[dict[str, float], float]:
        """The environment's metrics, and the reward that it gives at the end."""
        ...


class TurnEncoder(Protocol):
    """Tokens of what an environment says. Raises EpisodeError for messages and tools without a chat template."""

    def begin(self, text: Text, tools: Tools) -> list[int]:
        """A whole prompt."""
        ...

    def observe(self, text: Text) -> list[int]:
        """What follows a response, up to where the model writes again."""
        ...

    def tool_calls(self, response_ids: np.ndarray, tools: Tools) -> list[ToolCall]:
        """What the response calls, in order."""
        ...


class Steps:
    """Plays episodes with environments that have `reset` and `step`."""

    def __init__(self, encoder: TurnEncoder, decode: Decode) -> None:
        self._encoder, self._decode = encoder, decode

    def gauges(self) -> dict[str, float]:
        return {}

    async def play(self, attempt: Attempt, session: Session) -> Episode:
        """Turn after turn, up to the end. Raises EpisodeError."""
        with attempt.in_environment():
            said = await session.reset()
        prompt, tools = attempt.wanted.prompt, session.tools
        if said is None and tools:
            said = prompt.text  # once more, with the tools
        context = list(prompt.token_ids) if said is None else self._encoder.begin(said, tools)
        finish_reason, reward = await self._take_turns(attempt, session, context)
        if not attempt.num_turns:
            raise EpisodeError(f"reset: {len(context)} tokens to begin with leave no room in environment.max_context")
        if finish_reason == "time":
            return attempt.episode(finish_reason, reward, {})
        with attempt.in_environment():
            metrics, reward_at_the_end = await session.end()
        return attempt.episode(finish_reason, reward + reward_at_the_end, metrics)

    async def _take_turns(self, attempt: Attempt, session: Session, context: list[int]) -> tuple[FinishReason, float]:
        """Why it ended, and the sum of the rewards."""
        total = 0.0
        try:
            while True:
                sample = await attempt.sample(context)
                if sample.finish_reason == "length":
                    return "length", total
                with attempt.in_environment():
                    said, reward = await self._answer(session, sample.token_ids)
                total += reward
                if said is None:
                    return "stop", total
                context = [*context, *sample.token_ids.tolist(), *self._encoder.observe(said)]
        except EpisodeOver as over:
            return over.finish_reason, total + over.reward

    async def _answer(self, session: Session, response_ids: np.ndarray) -> tuple[Text | None, float]:
        """Of its tools to a response that calls any, of the environment to any other."""
        if calls := self._encoder.tool_calls(response_ids, session.tools):
            return await session.use_tools(calls), 0.0
        return await session.step(self._decode(response_ids))
