"""Tool calls in a sampled text.

    <tool_call>{"name": "multiply", "arguments": {"a": 6, "b": 7}}</tool_call>
    <tool_call><function=multiply><parameter=a>6</parameter><parameter=b>7</parameter></function></tool_call>

In: a response with its special tokens written out, and the tools that the model was shown. Out: its calls in order; one
that can't be read says why, for the model to read. What the model thinks (up to `</think>`) calls nothing. The
first form is that of Hermes, Qwen2.5 and Qwen3, the second that of Qwen3-Coder and Qwen3.5 (their chat templates). Does
not own: whether there is such a tool, and what it does (the environment).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

Tools = Sequence[dict[str, Any]]
"""JSON schemas, as chat templates take them."""

END_OF_THOUGHT = "</think>"
CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


class ToolCall(Struct, frozen=True):
    """worker -> host."""

    name: str
    arguments: dict[str, Any] = {}
    problem: str = ""
    """Why it can't be read; empty if it can."""


class _Json(Struct):
    name: str
    arguments: dict[str, Any] = {}


def parse_tool_calls(text: str, tools: Tools) -> list[ToolCall]:
    """`text`: all that was sampled in one turn."""
    bodies = CALL.findall(text.rpartition(END_OF_THOUGHT)[2])
    return [_xml(body, tools) if body.lstrip().startswith("<") else _json(body) for body in bodies]


def _json(body: str) -> ToolCall:
    try:
        said = msgspec.json.decode(body, type=_Json)
        return ToolCall(said.name, said.arguments)
    except (msgspec.DecodeError, RecursionError) as error:
        return ToolCall("", problem=f'a tool call is JSON with "name" and "arguments": {error}')


def _xml(body: str, tools: Tools) -> ToolCall:
    function = FUNCTION.fullmatch(body)
    if function is None:
        return ToolCall("", problem="a tool call is <function=name><parameter=name>value</parameter></function>")
    name, inside = function.groups()
    return ToolCall(name, dict(_arguments(inside, _parameters(name, tools))))


def _arguments(inside: str, schemas: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values without a type of their own: JSON, unless the tool takes a text."""
    for name, value in PARAMETER.findall(inside):
        if schemas.get(name, {}).get("type") != "string":
            with suppress(msgspec.DecodeError, RecursionError):  # else it is a text
                value = msgspec.json.decode(value)
        yield name, value


def _parameters(name: str, tools: Tools) -> dict[str, Any]:
    function = next((tool["function"] for tool in tools if tool["function"]["name"] == name), {})
    return function.get("parameters", {}).get("properties", {})
