"""Tool calls in a sampled text: each is found, in order, and what can't be read says why."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdapo.model.tool_calls import ToolCall, parse_tool_calls

MULTIPLY = {
    "type": "function",
    "function": {
        "name": "multiply",
        "parameters": {"properties": {"a": {"type": "integer"}, "words": {"type": "string"}, "b": {"type": "integer"}}},
    },
}
NAMES = st.text(st.characters(exclude_characters=">\n<", exclude_categories=["Cs"]), min_size=1)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)


def parse(text: str) -> list[ToolCall]:
    return parse_tool_calls(text, [MULTIPLY])


@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3))
def test_calls_are_found_in_their_order_between_other_words(calls) -> None:
    spelled = (json.dumps({"name": name, "arguments": given}).replace("<", "\\u003c") for name, given in calls)
    text = " and ".join(f"<tool_call>\n{one}\n</tool_call>" for one in spelled)
    assert parse(f"I call {text}.") == [ToolCall(name, given) for name, given in calls]


@given(st.text() | st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<function=", ">", "{", '"', "a"])))
def test_no_text_is_more_than_a_problem(said) -> None:
    text = "".join(said)
    assert all(call.problem or call.name for call in parse(text))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("", "JSON"),
        ("{'name': 1}", "JSON is malformed"),
        ('{"name": "multiply", "arguments": [1]}', "Expected `object`, got `array`"),
        ('{"arguments": {}}', "missing required field `name`"),
        ('{"name": "multiply", "arguments": {"a": ' + "[" * 100_000, "a tool call is JSON"),
        ('{"name": "\\ud800"}', "truncated"),
    ],
)
def test_a_call_that_can_not_be_read_says_why(body: str, problem: str) -> None:
    [call] = parse(f"<tool_call>{body}</tool_call>")
    assert call.problem.startswith('a tool call is JSON with "name" and "arguments": ')
    assert problem in call.problem
    assert (call.name, call.arguments) == ("", {})


def test_a_call_without_its_end_counts() -> None:
    assert parse('<tool_call>{"name": "multiply"}') == [ToolCall("multiply")]


def test_what_is_only_thought_calls_nothing() -> None:
    call = '<tool_call>{"name": "multiply"}</tool_call>'
    assert parse(f"<think>perhaps {call}</think>42") == []
    assert parse(f"<think>perhaps {call}</think>{call}") == [ToolCall("multiply")]


def test_the_values_of_xml_have_the_types_that_the_tool_takes() -> None:
    text = """<tool_call>
<function=multiply>
<parameter=a>
6
</parameter>
<parameter=words>
7
8
</parameter>
<parameter=b>seven</parameter>
<parameter=other>[1, 2]</parameter>
</function>
</tool_call>"""
    assert parse(text) == [ToolCall("multiply", {"a": 6, "words": "7\n8", "b": "seven", "other": [1, 2]})]
    assert parse("<tool_call><function=none></function></tool_call>") == [ToolCall("none")]
    assert parse("<tool_call><f></tool_call>")[0].problem.startswith("a tool call is <function=name>")
