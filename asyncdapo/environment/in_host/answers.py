"""What a host may answer: checks of what an environment returns, and its errors in one line.

In: whatever the user's code returned or raised. Out: an `Answer`, or BrokenContractError. Does not own: who is called.
"""

from __future__ import annotations

import importlib
import math
import reprlib
import traceback
from pathlib import Path
from typing import Any

OBSERVATION = "an observation is a text, a list of messages with role and content, or None"
MAX_PROBLEM_CHARS = 1000
MAX_METRICS = 100

Answer = dict[str, Any]
"""JSON: the fields of `host.Answer`."""


class UnusableError(Exception):
    """What `environment.path` names can't be used. The message says why, and what to do."""


class BrokenContractError(Exception):
    """The environment returned what the contract doesn't allow."""


def observed(said: Any, max_chars: int) -> Answer:
    """An observation. Too long a text is not sent; its length is."""
    if said is None:
        return {"observation": None}
    if not isinstance(said, str):
        check_messages(said)
    num_chars = len(said) if isinstance(said, str) else sum(len(message["content"]) for message in said)
    if num_chars > max_chars:
        return {"observation": None, "num_chars": num_chars}
    return {"observation": said}


def check_messages(said: Any) -> None:
    """Raises BrokenContractError for what is no list of messages."""
    messages = isinstance(said, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() and isinstance(message["content"], str)
        for message in said
    )
    if not messages or not said:
        shown = reprlib.repr(said)
        raise BrokenContractError(f"{OBSERVATION}; a step may return (observation, reward): got {shown}")


def graded(said: Any) -> Answer:
    """What a program that calls the model returns: a reward, or (reward, metrics)."""
    if not isinstance(said, tuple):
        return {"reward": finite("a reward", said)}
    if len(said) != 2:
        raise BrokenContractError(f"returned a tuple of {len(said)}; (reward, metrics) has two")
    return {"reward": finite("a reward", said[0]), "metrics": read_metrics(said[1])}


def finite(what: str, value: Any) -> float:
    """The value as a number. Raises BrokenContractError if it isn't a finite one."""
    if isinstance(value, str | bytes):
        raise BrokenContractError(f"{what} is a finite number, got {reprlib.repr(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BrokenContractError(f"{what} is a finite number, got {reprlib.repr(value)}")
    return number


def read_metrics(said: Any) -> dict[str, float]:
    """Raises BrokenContractError for what is no dict of finite numbers."""
    if not isinstance(said, dict) or len(said) > MAX_METRICS or not all(isinstance(name, str) for name in said):
        raise BrokenContractError(
            f"metrics are a dict of at most {MAX_METRICS} numbers by name, got {reprlib.repr(said)}"
        )
    return {name: finite(f"metric {name!r}", value) for name, value in said.items()}


def describe(error: BaseException) -> str:
    """Type and message of an error in one line, and where in the user's code, or what that calls, it was raised."""
    if isinstance(error, UnusableError):
        return str(error)
    report = traceback.TracebackException.from_exception(error)
    words = " ".join(f"{type(error).__name__}: {report}"[:MAX_PROBLEM_CHARS].split())
    problem = "".join(char if char.isprintable() else "?" for char in words)
    theirs = [frame for frame in report.stack if not _is_ours(frame.filename)]
    return f"{problem} (in {theirs[-1].name}, {theirs[-1].filename}:{theirs[-1].lineno})" if theirs else problem


def _is_ours(file: str) -> bool:
    """Whether code there only calls the user's: a host's own, and what imports modules."""
    return Path(file).parent == Path(__file__).parent or file.startswith("<frozen") or file == importlib.__file__
