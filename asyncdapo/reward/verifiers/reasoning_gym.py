"""Verifier `reasoning_gym`: the verdict of the data set's own scorer.

Needs the extra `reasoning-gym`. The expected answer is JSON, `{"dataset": "spell_backward", "entry": {…}}`, where entry
is what the data set yielded (question, answer, metadata). The response's answer is inside its last
`<answer>…</answer>`, or else follows its last `Answer:`. A scorer may give partial credit.

Some scorers raise on answers that they can't read: such an answer is wrong. If a scorer also raises on the entry's own
answer, the model isn't at fault, and the error is passed on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import reasoning_gym

Score = Callable[[str | None, dict[str, Any]], float]


def verify(text: str, answer: str) -> dict[str, float | str | None]:
    """`acc` 0.0 to 1.0; `pred`, what the text answers. Raises ValueError for an expected answer of another form, and
    what the scorer raises on the entry's own answer."""
    score, entry = _expected(answer)
    pred = extract(text)
    try:
        return {"acc": score(pred, entry), "pred": pred}
    except Exception:  # noqa: BLE001 - a scorer may raise anything on what a model wrote
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
        _ = entry["question"], entry["answer"]
    except (ValueError, TypeError, KeyError) as error:
        problem = 'the expected answer is JSON, {"dataset": …, "entry": {"question": …, "answer": …, "metadata": …}}'
        raise ValueError(f"{problem}, got {answer[:80]!r}") from error
    score = reasoning_gym.get_score_answer_fn(dataset)  # pyright: ignore[reportAttributeAccessIssue] (an extra: without it, this file is found)
    return score, entry
