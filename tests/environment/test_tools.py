"""Tools: what a model is shown of a class, and what it is told when it calls."""

from __future__ import annotations

import pytest
from transformers.utils import get_json_schema

from asyncdapo.environment.in_host.tools import schema_of, tool_methods
from asyncdapo.errors import EpisodeError, RunError
from asyncdapo.model.tool_calls import ToolCall
from tests.asynchronous import asynchronous
from tests.environment import shapes
from tests.environment.hosting import SHAPES, hosting, scripted


@pytest.mark.parametrize(
    "method", [shapes.Workshop.multiply, shapes.Typed.every, shapes.Counter.add, shapes.Workshop.give_up]
)
def test_the_schemas_are_those_that_transformers_makes(method) -> None:
    theirs = get_json_schema(method)
    assert schema_of(method.__name__, method, shows_returned=True) == theirs
    theirs["function"].pop("return", None)
    assert schema_of(method.__name__, method) == theirs


def test_public_methods_with_a_docstring_are_tools_but_those_of_the_contract() -> None:
    assert list(tool_methods(shapes.Workshop, ("reset", "step"))) == ["exit", "give_up", "multiply", "wait"]


@asynchronous
async def test_calls_are_answered_in_their_order_and_what_goes_wrong_is_told_the_model() -> None:
    calls = {
        "42": ToolCall("multiply", {"a": 6, "b": 7}),
        "waited 0.01": ToolCall("wait", {"seconds": 0.01}),
        "Error: there is no tool 'divide'; there are exit, give_up, multiply, wait": ToolCall("divide", {"a": 6}),
        "Error: multiply: missing a required argument: 'a'": ToolCall("multiply", {"b": 7}),
        "Error: multiply: got an unexpected keyword argument 'c'": ToolCall("multiply", {"a": 1, "c": 7}),
        "Error: multiply: multiple values for argument 'self'": ToolCall("multiply", {"a": 1, "self": 7}),
        "Error: RuntimeError: on fire: why": ToolCall("give_up", {"function": "why"}),
        "Error: not JSON": ToolCall("", problem="not JSON"),
        "[6, 6]": ToolCall("multiply", {"a": 2, "b": [6]}),
        "Error: there is no tool '__init__'; there are exit, give_up, multiply, wait": ToolCall("__init__"),
    }
    async with hosting(f"{SHAPES}:Workshop") as hosts:
        said = await hosts.in_environment({"answer": "42"}, scripted(list(calls.values()), "Answer: 42"))
    assert [(one["role"], one["name"], one["content"]) for one in said[1]] == [
        ("tool", call.name, content) for content, call in calls.items()
    ]
    assert said[2:] == [None, 1.0, {"calls": 2}]


@asynchronous
async def test_the_tools_are_known_before_an_episode_begins() -> None:
    async with hosting(f"{SHAPES}:Workshop") as hosts:
        names = await hosts.in_environment({"answer": ""}, lambda session: names_of(session))
    assert names == ["exit", "give_up", "multiply", "wait"]


async def names_of(session) -> list[str]:
    return [tool["function"]["name"] for tool in session.tools]


@asynchronous
async def test_a_tool_has_the_limits_of_a_step() -> None:
    late = [ToolCall("wait", {"seconds": 20})]
    async with hosting(f"{SHAPES}:Workshop", step_timeout_s=0.5) as hosts:
        assert await hosts.in_environment({"answer": "1"}, scripted(late)) == [None, "time", 0.0]
    async with hosting(f"{SHAPES}:Workshop", retries=0) as hosts:
        with pytest.raises(EpisodeError, match="tools: SystemExit: 1"):
            await hosts.in_environment({"answer": "1"}, scripted([ToolCall("exit")]))


@asynchronous
async def test_results_that_fit_no_context_end_the_episode() -> None:
    long = [ToolCall("multiply", {"a": 10**6, "b": "x"})] * 2
    async with hosting(f"{SHAPES}:Workshop") as hosts:
        assert await hosts.in_environment({"answer": "1"}, scripted(long)) == [None, "length", 0.0]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Unannotated", "the parameter a of the tool tool has no annotation; a method that is no tool begins with _"),
        ("Variadic", r"the tool tool takes \*words: str: a model gives arguments by name"),
        ("Nothing", "Nothing has neither a method step nor tools: methods with a docstring"),
        ("Silent", "the tool undocumented of Silent has no docstring"),
        ("asyncio", "asyncio is no class; a function that calls the model is named agent:"),
    ],
)
@asynchronous
async def test_a_class_of_no_shape_is_refused_in_one_line(name: str, problem: str) -> None:
    with pytest.raises(RunError, match=f"can't be loaded: {problem}"):
        async with hosting(f"{SHAPES}:{name}"):
            pass
