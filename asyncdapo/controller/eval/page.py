"""The page of an evaluation: one HTML file that holds answers, metrics and the program that shows them.

In: the lines of answers.jsonl, read twice, and metrics. Out: the file's bytes: `page.html` with the data put
in. It needs no network, and its own rules (Content-Security-Policy) forbid it any, and any program but its own. Nothing
that a model or a data set wrote is ever markup: it travels as JSON and is shown as text.

Prompts and responses get `TEXT_BUDGET` characters together. When they have more, the longest show their beginning and
their end, and say how much is left out and in which line of answers.jsonl it stands; verdicts, lengths and predictions
are always all there.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from asyncdapo.controller.eval.lines import AnswerLine

TEXT_BUDGET = 32_000_000
"""Characters of prompts and responses on a page; browsers open it within some seconds."""
SHORT = 2_000
"""Characters of an expected answer or a prediction."""

TEMPLATE = Path(__file__).with_name("page.html")
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""In JSON these only stand in texts, and so escaped they can't end the element that holds the data."""


def render(
    title: str,
    lines: Callable[[], Iterable[AnswerLine]],
    metrics: Mapping[str, float],
    budget: int = TEXT_BUDGET,
) -> bytes:
    """The page. `lines` is called twice, and gives the same lines each time."""
    longest = longest_shown((len(text) for text in _texts(lines())), budget)
    prompts: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines(), 1):
        prompt = prompts.setdefault(line.prompt_id, _prompt(line, longest))
        prompt["answers"].append(_answer(number, line, longest))
    for prompt in prompts.values():
        prompt["answers"].sort(key=lambda answer: (answer["greedy"], answer["sample"]))
    data = {"title": title, "metrics": metrics, "prompts": [prompts[prompt_id] for prompt_id in sorted(prompts)]}
    return _filled(data)


def longest_shown(lengths: Iterable[int], budget: int) -> int:
    """The highest limit at which all texts, those above it cut to it, have at most `budget` characters together."""
    rising = sorted(lengths)
    for place, length in enumerate(rising):
        share = budget // (len(rising) - place)
        if length > share:
            return share
        budget -= length
    return rising[-1] if rising else 0


def _texts(lines: Iterable[AnswerLine]) -> Iterable[str]:
    """Every response and observation, and the prompts: those of an answer's neighbours are mostly the same."""
    for _, together in groupby(lines, key=lambda line: line.prompt_id):
        for place, line in enumerate(together):
            if place == 0:
                yield line.prompt
            yield from (text for _, text in line.answered().answer.parts)


def _prompt(line: AnswerLine, longest: int) -> dict[str, Any]:
    return {
        "id": line.prompt_id,
        "source": line.source,
        "row": line.row,
        "text": _cut(line.prompt, longest),
        "answer": line.answer[:SHORT],
        "answers": [],
    }


def _answer(number: int, line: AnswerLine, longest: int) -> dict[str, Any]:
    """`number` is that of the line in answers.jsonl."""
    return {
        "line": number,
        "sample": line.sample,
        "greedy": line.greedy,
        "acc": line.acc,
        "failure": line.failure[:SHORT],
        "pred": line.pred and line.pred[:SHORT],
        "tokens": line.num_tokens,
        "finish": line.finish_reason,
        "versions": [line.version_min, line.version_max],
        "parts": [[whose, _cut(text, longest)] for whose, text in line.answered().answer.parts],
    }


def _cut(text: str, longest: int) -> list[str | int]:
    """The text; or its beginning, its end, and how many characters are missing between."""
    if len(text) <= longest:
        return [text]
    begin = longest // 2
    end = len(text) - (longest - begin)
    return [text[:begin], text[end:], end - begin]


def _filled(data: Mapping[str, Any]) -> bytes:
    """The template with the data in it, and the hash of its one program."""
    template = TEMPLATE.read_text(encoding="utf-8")
    program = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    text = msgspec.json.encode(data).decode()
    safe = re.sub(f"[{''.join(ESCAPES)}]", lambda found: ESCAPES[found[0]], text)
    before, after = template.replace("PROGRAM_HASH", f"sha256-{digest}", 1).split("PAGE_DATA")
    return "".join((before, safe, after)).encode()
