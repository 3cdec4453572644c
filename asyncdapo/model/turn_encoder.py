"""What an environment says as tokens: the beginning of an episode, and what follows a response. And a response's calls.

In: a text, or messages with `role` and `content`; the tokens of a response. Out: token ids; tool calls. A response that
was sampled is never encoded: only what is between two responses. With a chat template that is the template's text
behind the assistant's words, which may not depend on what was said before (`ChatTurns.check`). Does not own: the
sampled tokens (rollout).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from asyncdapo.errors import ConfigError, EpisodeError
from asyncdapo.messages import Text
from asyncdapo.model.tokenizer import TextTokenizer
from asyncdapo.model.tool_calls import ToolCall, Tools, parse_tool_calls

SPOKEN = "\u2402spoken\u2403"
"""Stands for the assistant's words: its place in the rendered text is where they end."""
THOUGHT = "<think>\nWhat now?\n</think>\n\n"
"""What some models write first, and some templates leave out of earlier turns."""
REWRITES = (
    "prompts.chat_template: the model's chat template leaves thoughts out of earlier turns; in this run they stay as "
    "they were sampled. A server that uses the template shows the model something else. Give the template the argument "
    "that keeps them, if it has one (prompts.chat_template={NAME: VALUE}), or take another template (model.tokenizer)"
)


class PlainTurns:
    """Without a chat template: the text as it is."""

    def __init__(self, tokenizer: TextTokenizer, *, joins: bool) -> None:
        """`joins`: messages are allowed, and are their texts one after the other."""
        self._tokenizer, self._joins = tokenizer, joins

    def begin(self, text: Text, tools: Tools = ()) -> list[int]:
        if tools:
            raise EpisodeError("its tools need prompts.chat_template")
        return self._tokenizer.encode(self._joined(text))

    def observe(self, text: Text, *, cut_off: bool = False) -> list[int]:
        return self._tokenizer.encode_more(self._joined(text))

    def written(self, response_ids: np.ndarray) -> str:
        return self._tokenizer.decode(response_ids)

    def _joined(self, text: Text) -> str:
        if isinstance(text, str):
            return text
        if not self._joins:
            raise EpisodeError("messages need prompts.chat_template; without it an observation is a text")
        ends = {"assistant": self._tokenizer.end_of_turn}
        return "".join(message["content"] + ends.get(message["role"], "") for message in text)

    def tool_calls(self, response_ids: np.ndarray, tools: Tools) -> list[ToolCall]:
        return []

    def check(self, role: str = "user") -> None:
        """A text without a template stands alone: it depends on nothing."""

    def warning(self, role: str = "user") -> str:
        return ""


class ChatTurns:
    """With a chat template. A text is a message of the user's."""

    def __init__(self, tokenizer: TextTokenizer, system_prompt: str | None) -> None:
        self._tokenizer = tokenizer
        self._system = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def begin(self, text: Text, tools: Tools = ()) -> list[int]:
        messages = _messages(text)
        own = [] if messages[0]["role"] == "system" else self._system
        rendered = self._render([*own, *messages], tools)
        if unseen := [name for tool in tools if (name := tool["function"]["name"]) not in rendered]:
            raise EpisodeError(f"the model's chat template leaves out the tools ({', '.join(unseen)})")
        return self._tokenizer.encode_more(rendered)

    def observe(self, text: Text, *, cut_off: bool = False) -> list[int]:
        """`cut_off`: the response has no stop token, which the template then writes."""
        stop = self._tokenizer.end_of_turn if cut_off else ""
        return self._tokenizer.encode_more(stop + self._behind("1 + 1 = ?", _messages(text)))

    def written(self, response_ids: np.ndarray) -> str:
        """The response with its special tokens, but for the stop token."""
        return self._tokenizer.spell(response_ids.tolist()).removesuffix(self._tokenizer.end_of_turn)

    def tool_calls(self, response_ids: np.ndarray, tools: Tools) -> list[ToolCall]:
        """Of a response, in their order. In some vocabularies the marks around a call are special tokens."""
        return parse_tool_calls(self.written(response_ids) if tools else "", tools)

    def check(self, role: str = "user") -> None:
        """Raises ConfigError if the template writes what follows a response in a way that depends on what was said
        before: a turn's prompt would not be what the model has read and written. `role`: who answers the response."""
        observed = [{"role": role, "content": "no"}]
        if self._behind("1 + 1 = ?", observed) != self._behind("Tell me more.\nOr less.", observed):
            problem = "the model's chat template writes an observation differently after other words"
            raise ConfigError("prompts.chat_template", problem, True, "an environment needs prompts.template")

    def warning(self, role: str = "user") -> str:
        """What the template does with earlier turns that the user should know; empty if it keeps them as they were.
        `role`: who answers the response."""
        asked = [*self._system, {"role": "user", "content": "1 + 1 = ?"}]
        said = THOUGHT + SPOKEN
        told = [*asked, {"role": "assistant", "content": said}, {"role": role, "content": "no"}]
        return "" if self._render(told).startswith(self._render(asked) + said) else REWRITES

    def _behind(self, question: str, observed: list[dict[str, Any]]) -> str:
        """The text behind the assistant's words. A response has its stop token already."""
        said = [*self._system, {"role": "user", "content": question}, {"role": "assistant", "content": SPOKEN}]
        _, found, behind = self._render([*said, *observed]).rpartition(SPOKEN)
        if not found:
            raise EpisodeError("the chat template leaves out what the assistant said")
        return behind.removeprefix(self._tokenizer.end_of_turn)

    def _render(self, messages: list[dict[str, Any]], tools: Tools = ()) -> str:
        try:
            return self._tokenizer.render(messages, tools)
        except Exception as error:  # a template is code, which may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise EpisodeError(f"the chat template refuses messages of {roles}: {error}") from error


def turn_encoder(
    tokenizer: TextTokenizer, chat_template: bool, system_prompt: str | None, *, joins: bool = False
) -> PlainTurns | ChatTurns:
    """Raises ConfigError for a chat template that can't be used for several turns. `joins`: messages without one are
    their texts one after the other."""
    turns = ChatTurns(tokenizer, system_prompt) if chat_template else PlainTurns(tokenizer, joins=joins)
    turns.check()
    return turns


def _messages(text: Text) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}] if isinstance(text, str) else text
