"""Tools: the public methods of a class, as a model is shown them and as it calls them.

    def multiply(self, a: int, b: int) -> str:          {"type": "function", "function": {
        \"\"\"Multiply two whole numbers.                       "name": "multiply",
                                                  ──▶      "description": "Multiply two whole numbers.",
        Args:                                              "parameters": {"type": "object", "properties": {
            a: The first.                                      "a": {"type": "integer", "description": "The first."},
            b: The second.                                     …}, "required": ["a", "b"]}}}
        \"\"\"

In: a class; calls. Out: JSON schemas; an answer to each call. Every public method with a docstring is a tool, but those
of the contract. The schemas are those that Transformers makes of the same methods, without what is returned; TRL shows
its classes' models that, too. Whatever goes wrong with a call is told the model: it may do better in its next turn.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Collection
from typing import Any, Literal, Union

from asyncdapo.environment.in_host.answers import UnusableError

BASIC = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
SECTION = re.compile(r"^\s*(Args|Returns|Raises):[ \t]*$", re.MULTILINE)
ARGUMENT = re.compile(r"^(\w+)(?: \(.*?\))?:\s*(.*)$")
MAX_ERROR_CHARS = 1000

Schema = dict[str, Any]


def tool_methods(cls: type, reserved: Collection[str]) -> dict[str, Callable[..., Any]]:
    """By name. `reserved`: methods that aren't tools."""
    methods = inspect.getmembers(cls, inspect.isfunction)
    return {name: one for name, one in methods if name[0] != "_" and name not in reserved and one.__doc__}


def schema_of(name: str, method: Callable[..., Any], *, shows_returned: bool = False) -> Schema:
    """`shows_returned`: with what it returns, as Transformers has it. Raises UnusableError for a parameter that has no
    annotation, or one that a model can't give."""
    hints = typing.get_type_hints(method)
    description, words, returned = read_docstring(inspect.getdoc(method) or "")
    properties, required = {}, []
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        if parameter.name not in hints:
            problem = f"the parameter {parameter.name} of the tool {name} has no annotation"
            raise UnusableError(f"{problem}; a method that is no tool begins with _ or has no docstring")
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UnusableError(f"the tool {name} takes {parameter}: a model gives arguments by name")
        properties[parameter.name] = type_schema(hints[parameter.name])
        if parameter.name in words:
            properties[parameter.name]["description"] = words[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    function = {"name": name, "description": description, "parameters": parameters}
    if shows_returned and "return" in hints:
        function["return"] = type_schema(hints["return"]) | ({"description": returned} if returned else {})
    return {"type": "function", "function": function}


def read_docstring(text: str) -> tuple[str, dict[str, str], str]:
    """What it does, what its arguments are, and what it returns, from a docstring in Google's style."""
    description, *sections = SECTION.split(text)
    named = dict(zip(sections[::2], sections[1::2], strict=True))
    words: dict[str, str] = {}
    name = ""
    for line in filter(None, map(str.strip, named.get("Args", "").splitlines())):
        if begun := ARGUMENT.match(line):
            name, words[begun[1]] = begun[1], begun[2]
        elif name:
            words[name] += f" {line}"
    return description.strip(), words, named.get("Returns", "").strip()


def type_schema(hint: Any) -> Schema:
    """JSON schema of an annotation. One that JSON has no type for is an object."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _union(parts)
    if origin is Literal:
        kinds = list(dict.fromkeys(BASIC[type(value)] for value in parts))
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(parts)}
    if hint is Any:
        return {}
    if (origin or hint) in (list, tuple):
        if origin is tuple:
            return {"type": "array", "prefixItems": [type_schema(part) for part in parts]}
        return {"type": "array"} | ({"items": type_schema(parts[0])} if parts else {})
    if origin is dict and len(parts) == 2:
        return {"type": "object", "additionalProperties": type_schema(parts[1])}
    return {"type": BASIC.get(hint, "object")}


def _union(parts: tuple[Any, ...]) -> Schema:
    schemas = [type_schema(part) for part in parts if part is not type(None)]
    if len(schemas) == 1:
        schema = schemas[0]
    elif all(one.keys() == {"type"} for one in schemas):
        schema = {"type": sorted({one["type"] for one in schemas})}
    else:
        schema = {"anyOf": schemas}
    return schema | ({"nullable": True} if type(None) in parts else {})


def refusal(call: dict[str, Any], methods: dict[str, Callable[..., Any]]) -> str:
    """Why the call can't be made; empty if it can."""
    name = call["name"]
    if call["problem"]:
        return f"Error: {call['problem']}"
    if name not in methods:
        return f"Error: there is no tool {name!r}; there are {', '.join(methods)}"
    try:
        inspect.signature(methods[name]).bind(None, **call["arguments"])
    except TypeError as error:
        return f"Error: {name}: {error}"
    return ""


def told(result: Any) -> str:
    """What a tool returned, as the model reads it."""
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


def told_error(error: Exception) -> str:
    """What a tool raised, as the model reads it."""
    return f"Error: {type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
