"""Judges the texts of a request, in a verifier process.

In: texts, the expected answer of each. Out: a `Verdict` for each text, in order, each reported at once. The first text
without a verdict is reported as `Raised` or `NoVerdict`, and the request ends there. A verifier that raises is called
again, after a pause that doubles each time. Does not own: async verifiers (`async_judge`), time-outs (the pool).
"""

from __future__ import annotations

import inspect
import math
import re
import reprlib
import time
from collections.abc import Callable, Mapping, Sequence
from traceback import TracebackException
from typing import Any

from asyncdapo.reward.registry import Verify
from asyncdapo.reward.wire import METRICS, NoVerdict, Raised, Said, Verdict

MAX_PROBLEM_CHARS = 1000
MAX_METRICS = 100
"""A limit, since metrics are sent and stored with every completion."""
MAX_PRED_CHARS = 1000
"""A longer prediction is cut here."""
METRIC_NAME = re.compile(r"[\w./-]{1,100}")

FIX = "return 1 for right and 0 for wrong; reward.correct and reward.incorrect set the rewards for these"

Tell = Callable[[Said], None]
Judge = Callable[[Sequence[str], Sequence[str], Tell], None]
"""(texts, expected answer of each, callback for each verdict)."""


def judge(verify: Verify, pauses: Sequence[float], texts: Sequence[str], answers: Sequence[str], tell: Tell) -> None:
    """Judge one text after the other. `pauses`: seconds before each retry."""
    for text, answer in zip(texts, answers, strict=True):
        said = _judge_one(verify, pauses, text, answer)
        tell(said)
        if not isinstance(said, Verdict):
            break


def _judge_one(verify: Verify, pauses: Sequence[float], text: str, answer: str) -> Said:
    for pause_s in (*pauses, None):
        try:
            return read_verdict(verify(text, answer))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it raises fails only its group
            raised = Raised(describe(error))
        if pause_s is not None:
            time.sleep(pause_s)
    return raised


def read_verdict(said: Any) -> Verdict | NoVerdict:
    """The verdict that the verifier returned, or `NoVerdict` with the reason why it isn't one."""
    if inspect.isawaitable(said):
        if inspect.iscoroutine(said):
            said.close()  # nobody awaits it: Python would warn
        return NoVerdict("returned an awaitable: make the function itself `async def`")
    numbers = dict(said) if isinstance(said, Mapping) else {"acc": said}
    pred = _text(numbers.pop("pred", None))
    if "acc" not in numbers:
        return NoVerdict(f"a dict of numbers needs `acc`, the verdict from 0 to 1, got {reprlib.repr(said)}")
    acc = _number(numbers.pop("acc"))
    if not 0 <= acc <= 1:
        return NoVerdict(f"a verdict is a number from 0 to 1, got {reprlib.repr(said)} ({FIX})")
    if len(numbers) > MAX_METRICS:
        return NoVerdict(f"a verdict may have {MAX_METRICS} numbers besides `acc`, got {len(numbers)}")
    for name, number in numbers.items():
        if not (isinstance(name, str) and METRIC_NAME.fullmatch(name)):
            return NoVerdict(
                f"a metric's name may have letters, digits, `_`, `.`, `/` and `-`, got {reprlib.repr(name)}"
            )
        if name in METRICS:
            return NoVerdict(f"{name!r} is reserved ({', '.join(METRICS)}); choose another name for this metric")
        numbers[name] = _number(number)
        if not math.isfinite(numbers[name]):
            return NoVerdict(f"metric {name!r} must be a finite number, got {reprlib.repr(number)}")
    return Verdict(acc, pred=pred, metrics=numbers)


def _text(pred: Any) -> str | None:
    """The prediction as text that can be sent and compared: a lone surrogate becomes a question mark."""
    return None if pred is None else str(pred)[:MAX_PRED_CHARS].encode(errors="replace").decode()


def _number(value: Any) -> float:
    """The value as a number; NaN if it isn't one. Strings don't count as numbers."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except Exception:  # noqa: BLE001 - the `__float__` of the user's class may raise anything
        return math.nan


def describe(error: BaseException) -> str:
    """Type and message of an error in one line, and where it was raised."""
    report = TracebackException.from_exception(error)
    problem = " ".join(f"{type(error).__name__}: {report}"[:MAX_PROBLEM_CHARS].split())
    last = report.stack[-1]
    said = f"{problem} (in {last.name}, {last.filename}:{last.lineno})"
    return said.encode(errors="backslashreplace").decode()
