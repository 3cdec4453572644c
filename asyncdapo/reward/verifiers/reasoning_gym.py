"""Verifier `reasoning_gym`: what the data set's own scorer says of the answer.

Needs the extra `reasoning-gym`. The expected answer is JSON, `{"dataset": "spell_backward", "entry": {…}}`, where entry
is what the data set yielded (question, answer, metadata). The response's answer is what stands in its last
`<answer>…</answer>`, or else behind its last `Answer:`. Scorers give part of the credit as they see fit.

Some scorers raise on answers that they can't read: such an answer is wrong. If a scorer also raises on the entry's own
answer, it isn't the model's fault, and the error is passed on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import reasoning_gym

Score = Callable[[str | None, dict[str, Any]], float]


def verify(text: str, answer: str) -> dict[str, float | str | None]:
    """`acc` 0.0 to 1.0; `pred`, what the text answers. Raises ValueError for an expected answer that isn't as
    described, and what a scorer raises at it."""
    score, entry = _expected(answer)
    pred = extract(text)
    try:
        return {"acc": score(pred, entry), "pred": pred}
    except Exception:  # noqa: BLE001 - a scorer may raise anything at what a model wrote
        score(entry["answer"], entry)
        return {"acc": 0.0, "pred": pred}


def extract(text: str) -> str | None:
    """The response's answer; None without one."""
    before, end, _ = text.rpartition("</answer>")
    _, begin, inside = before.rpartition("<answer>")
    if begin and end:
        return inside.strip()
    _, mark, given = text.rpartition("Answer:")
    return given.strip() if mark else None


@lru_cache(maxsize=1)
def _expected(answer: str) -> tuple[Score, dict[str, Any]]:
    """Read once for all completions of a prompt."""
    try:
        wanted = json.loads(answer)
        dataset, entry = wanted["dataset"], wanted["entry"]
        entry["question"], entry["answer"]
    except (ValueError, TypeError, KeyError) as error:
        problem = 'the expected answer is JSON, {"dataset": …, "entry": {"question": …, "answer": …, "metadata": …}}'
        raise ValueError(f"{problem}, got {answer[:80]!r}") from error
    return reasoning_gym.get_score_answer_fn(dataset), entry
