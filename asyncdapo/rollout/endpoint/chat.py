"""Chat: conversations as the tokens that were read and sampled.

    messages ──▶ the longest beginning that was sampled ──▶ its tokens, and the template's for what is new
                 none                                   ──▶ the template's for all: another context

In: an attempt's conversations. Out: prompts, and samples as messages. Invariants: text that was sampled is never
tokenised again while the client sends it back as it was; a client that changes it, such as one that leaves out what the
model thought, begins another context. Does not own: tokens and limits (`several_turns/attempt`), tool calls in a text
(the encoder).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from asyncdapo.errors import EpisodeError
from asyncdapo.messages import Text
from asyncdapo.rollout.endpoint.chat_wire import (
    CalledTool,
    ChatBody,
    ChatMessage,
    Completed,
    Function,
    TokenLogprob,
)
from asyncdapo.rollout.endpoint.wire import Refused
from asyncdapo.rollout.engine import Sample

CALL = "<tool_call>"
"""What a model writes before this isn't part of a call."""


class Conversing(Protocol):
    """Messages as tokens, and back. Raises EpisodeError for what the model's chat template refuses."""

    def begin(self, text: Text, tools: Sequence[dict[str, Any]]) -> list[int]:
        """A whole prompt."""
        ...

    def observe(self, text: Text, *, cut_off: bool = False) -> list[int]:
        """What follows a response, up to where the model writes again. `cut_off`: it has no stop token."""
        ...

    def tool_calls(self, response_ids: np.ndarray, tools: Sequence[dict[str, Any]]) -> Sequence[Any]:
        """What the response calls: `name`, `arguments`, and a `problem` if that can't be read."""
        ...

    def written(self, response_ids: np.ndarray) -> str:
        """The response with its special tokens, but for the stop token."""
        ...


class Spelling(Protocol):
    """Tokens as text."""

    def decode(self, token_ids: np.ndarray) -> str:
        """Without special tokens."""
        ...

    def spell(self, token_ids: Sequence[int]) -> str:
        """With special tokens."""
        ...


class Chat:
    """The conversations of one attempt."""

    def __init__(self, encoder: Conversing, tokenizer: Spelling) -> None:
        self._encoder, self._tokenizer = encoder, tokenizer
        self._sampled: dict[tuple[bytes, ...], tuple[list[int], bool]] = {}
        """By the keys of tools and messages: all tokens up to the last message, which was sampled; whether it was cut
        off."""

    def prompt(self, body: ChatBody) -> list[int]:
        """What the model is to read. Raises Refused."""
        messages = [message.rendered() for message in body.messages]
        keys = self._keys(body)
        try:
            for at in range(len(messages) - 1, 0, -1):
                known = self._sampled.get(keys[: 1 + at])
                if known is not None and all(message["role"] != "assistant" for message in messages[at:]):
                    token_ids, cut_off = known
                    return [*token_ids, *self._encoder.observe(messages[at:], cut_off=cut_off)]
            return self._encoder.begin(messages, body.tools or ())
        except EpisodeError as error:
            raise Refused(400, str(error)) from error

    def take(self, body: ChatBody, number: int, prompt_ids: list[int], sample: Sample) -> Completed:
        """The sample as a message; the conversation can go on from it."""
        message, cut_off = self._message(body, number, sample), sample.finish_reason == "length"
        self._sampled[(*self._keys(body), message.key())] = [*prompt_ids, *sample.token_ids.tolist()], cut_off
        return Completed(
            number=number,
            message=message,
            finish_reason="tool_calls" if message.tool_calls else sample.finish_reason,
            num_prompt_tokens=len(prompt_ids),
            num_sampled_tokens=len(sample.token_ids),
            logprobs=self._logprobs(sample) if body.logprobs else None,
        )

    def _logprobs(self, sample: Sample) -> list[TokenLogprob]:
        pairs = zip(sample.token_ids.tolist(), sample.logprobs.tolist(), strict=True)
        spelled = [(self._tokenizer.spell([token_id]), logprob) for token_id, logprob in pairs]
        return [TokenLogprob(token, logprob, list(token.encode())) for token, logprob in spelled]

    def _keys(self, body: ChatBody) -> tuple[bytes, ...]:
        tools = msgspec.json.encode(body.tools or [], order="deterministic")
        return (tools, *(message.key() for message in body.messages))

    def _message(self, body: ChatBody, number: int, sample: Sample) -> ChatMessage:
        """With the tool calls that can all be read; otherwise they are text."""
        if not body.tools or body.tool_choice == "none":
            return ChatMessage(role="assistant", content=self._tokenizer.decode(sample.token_ids))
        written, calls = (
            self._encoder.written(sample.token_ids),
            self._encoder.tool_calls(sample.token_ids, body.tools),
        )
        if not calls or any(call.problem for call in calls):
            return ChatMessage(role="assistant", content=written)
        tool_calls = [
            CalledTool(Function(call.name, msgspec.json.encode(call.arguments).decode()), f"call_{number}_{index}")
            for index, call in enumerate(calls)
        ]
        return ChatMessage(role="assistant", content=written.partition(CALL)[0].strip() or None, tool_calls=tool_calls)
