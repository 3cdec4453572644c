"""Checks that a function can be called as a verifier: with the response's text and the expected answer.

In: a user's function. Raises ConfigError before anything is sampled if it can't be called so. A function written for
another framework is recognised by its parameter names, and the error shows the lines that adapt it. Does not own: what
the function returns (`judge`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from asyncdapo.errors import ConfigError

GIVEN_BY_TRL = {"prompts", "completions", "completion_ids", "trainer_state"}
"""Parameters of TRL's reward functions that aren't columns of the data set."""


def check_signature(key: str, name: str, verify: Callable[..., Any]) -> None:
    """Raises ConfigError, for `key`, for a function that can't be called with two arguments or whose arguments have
    another meaning."""
    try:
        signature = inspect.signature(verify)
    except ValueError:  # written in C, without a signature
        return
    if "completions" in signature.parameters:
        whose, arguments, which = "TRL's", _arguments_of_trl(signature), "[0]"
    elif {"data_source", "solution_str"} <= signature.parameters.keys():
        whose, arguments, which = "verl's", '"your/data_set", text, answer', ""
    else:
        whose, arguments, which = "the", "…", ""
        try:
            signature.bind("text", "answer")
            return
        except TypeError:
            pass
    where, _, function = name.rpartition(":")
    module, place = (Path(where).stem, f" next to {Path(where).name}") if where.endswith(".py") else (where, "")
    define, call = ("async def", "await ") if inspect.iscoroutinefunction(verify) else ("def", "")
    returned = f"({call}{function}({arguments}))[0]" if call and which else f"{call}{function}({arguments}){which}"
    raise ConfigError(
        key,
        f"takes {whose} arguments {signature}, and a verifier is given (text, answer)",
        name,
        f"these three lines as adapter.py{place}, and {key}=adapter.py:verify; it returns 1 for right and 0 for wrong",
        [f"from {module} import {function}", f"{define} verify(text, answer):", f"    return {returned}"],
    )


def _arguments_of_trl(signature: Signature) -> str:
    """The arguments of a TRL reward function: lists of one element, and data set columns by name."""
    names = [name for name, parameter in signature.parameters.items() if parameter.kind is not Parameter.VAR_KEYWORD]
    columns = [name for name in names if name not in GIVEN_BY_TRL] or ["answer"]
    prompts = 'prompts=[""], ' if "prompts" in names else ""
    return f"{prompts}completions=[text], " + ", ".join(f"{column}=[answer]" for column in columns)
