"""OpenAI's chat completions: what a client sends, and the answer that its SDK reads.

In: bodies of requests; a sample as a message. Out: messages as chat templates take them; JSON, or server-sent events
for a client that asks for a stream. The sample is there at once, so a stream has all of it in one piece. Does not own:
which tokens the messages become (`chat`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from asyncdapo.rollout.endpoint.http import HttpAnswer
from asyncdapo.rollout.endpoint.wire import MODEL, Refused, json_answer

Rendered = dict[str, Any]
"""A message as chat templates take it."""


class Part(Struct, frozen=True):
    """Of a message's content."""

    type: str
    text: str = ""


class Function(Struct, frozen=True):
    name: str
    arguments: str = "{}"
    """JSON."""


class CalledTool(Struct, frozen=True):
    function: Function
    id: str = ""
    type: str = "function"


class ChatMessage(Struct, frozen=True, omit_defaults=True):
    """Of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET

    @property
    def text(self) -> str:
        """Raises Refused for what is no text."""
        if not isinstance(self.content, list):
            return self.content or ""
        if other := [part.type for part in self.content if part.type != "text"]:
            raise Refused(400, f"the model reads text, and a message has content of the type {other[0]!r}")
        return "".join(part.text for part in self.content)

    def rendered(self) -> Rendered:
        """Arguments of tool calls as objects: templates write them as JSON."""
        message: Rendered = {"role": self.role, "content": self.text}
        for name in ("tool_call_id", "name"):
            if (value := getattr(self, name)) is not UNSET:
                message[name] = value
        if self.tool_calls:
            calls = [{"name": one.function.name, "arguments": _read(one.function.arguments)} for one in self.tool_calls]
            message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return message

    def key(self) -> bytes:
        """Equal for messages that say the same: role, text and tool calls."""
        calls = [[one.function.name, _read(one.function.arguments)] for one in self.tool_calls or ()]
        return msgspec.json.encode([self.role, self.text, calls], order="deterministic")


class Parameters(Struct, frozen=True):
    properties: dict[str, dict[str, Any]] = {}


class Signature(Struct, frozen=True):
    name: str
    parameters: Parameters = Parameters()


class Tool(Struct, frozen=True):
    """What of a tool has to be as it is; the chat template gets all of it."""

    function: Signature


class StreamOptions(Struct, frozen=True):
    include_usage: bool = False


class ChatBody(Struct, frozen=True):
    """Of `POST /v1/chat/completions`, but for the sampling."""

    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None


class TokenLogprob(Struct, frozen=True):
    """Of a sampled token."""

    token: str
    """Its text, special tokens written out."""
    logprob: float
    bytes: list[int]
    """Of `token` in UTF-8."""
    top_logprobs: list[Any] = []
    """None but the sampled token's are known."""


class Completed(Struct, frozen=True):
    """A sample as a chat completion."""

    number: int
    message: ChatMessage
    finish_reason: str
    num_prompt_tokens: int
    num_sampled_tokens: int
    logprobs: list[TokenLogprob] | None
    """None: the client hasn't asked for them."""


def read_chat(raw: dict[str, Any]) -> ChatBody:
    """Raises Refused."""
    try:
        body = msgspec.convert(raw, ChatBody)
        msgspec.convert(body.tools or [], list[Tool])
    except msgspec.ValidationError as error:
        raise Refused(400, f"the body is no such request: {error}") from error
    if not body.messages:
        raise Refused(400, "a conversation has a message")
    return body


def chat_answer(done: Completed, body: ChatBody) -> HttpAnswer:
    """In the form that the client asks for."""
    if body.stream:
        events = _events(done, usage=body.stream_options is not None and body.stream_options.include_usage)
        lines = b"".join(b"data: %b\n\n" % event for event in [*map(msgspec.json.encode, events), b"[DONE]"])
        return HttpAnswer(content_type="text/event-stream", body=lines)
    message = {"role": "assistant", "content": done.message.content, "refusal": None}
    choice = {
        "index": 0,
        "message": message | _tool_calls(done.message.tool_calls or ()),
        "finish_reason": done.finish_reason,
        "logprobs": _logprobs(done),
    }
    return json_answer(_head(done, "chat.completion") | {"choices": [choice], "usage": _usage(done)})


def _events(done: Completed, *, usage: bool) -> Iterator[dict[str, Any]]:
    head, calls = _head(done, "chat.completion.chunk"), _tool_calls(done.message.tool_calls or (), numbered=True)
    whole = {"role": "assistant", "content": done.message.content} | calls
    for delta, finish_reason, logprobs in ((whole, None, _logprobs(done)), ({}, done.finish_reason, None)):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        yield head | {"choices": [choice]}
    if usage:
        yield head | {"choices": [], "usage": _usage(done)}


def _head(done: Completed, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{done.number}", "object": kind, "created": int(time.time()), "model": MODEL}


def _usage(done: Completed) -> dict[str, int]:
    read, sampled = done.num_prompt_tokens, done.num_sampled_tokens
    return {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled}


def _logprobs(done: Completed) -> dict[str, Any] | None:
    return None if done.logprobs is None else {"content": done.logprobs, "refusal": None}


def _tool_calls(calls: Sequence[CalledTool], *, numbered: bool = False) -> dict[str, Any]:
    """A stream numbers its pieces."""
    said = [msgspec.to_builtins(call) | ({"index": index} if numbered else {}) for index, call in enumerate(calls)]
    return {"tool_calls": said} if said else {}


def _read(arguments: str) -> Any:
    """What isn't JSON stays a text."""
    with suppress(msgspec.DecodeError, RecursionError):
        return msgspec.json.decode(arguments)
    return arguments
