"""What an evaluation comes to, for people: avg@k, pass@k, maj@k, and what the answers were like.

In: all answers of an evaluation, as answers.jsonl has them. Out: tables on standard output. Does not own: the formulas
(`sampled`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncdapo.controller.eval.answers import ANSWERS_FILE, METRICS_FILE, PAGE_FILE
from asyncdapo.controller.eval.lines import AnswerLine
from asyncdapo.controller.eval.sampled import AtK, table

MAX_SOURCES = 20
"""With more of them (a source for every row) there is no table of sources."""


def print_results(lines: Sequence[AnswerLine], out: Path, console: Console | None = None) -> None:
    """Tables, a line on the responses, and where the files are."""
    console = console or Console(highlight=False)
    sampled = [line for line in lines if not line.greedy]
    greedy = [line for line in lines if line.greedy]
    if sampled:
        console.print(_by_k(sampled))
    sources = _by_source(sampled or greedy)
    if 1 < len(sources) <= MAX_SOURCES:
        console.print(_of_sources(sources))
    for name, some in (("sampled", sampled), ("greedy", greedy)):
        if some:
            console.print(_described(name, some), soft_wrap=True)
    files = ", ".join((ANSWERS_FILE, METRICS_FILE, PAGE_FILE))
    console.print(f"{out}: {files}", soft_wrap=True, markup=False)


def _by_k(lines: Sequence[AnswerLine]) -> Table:
    shown = _table("k", "avg@k", "pass@k", "maj@k")
    for row in table([line.answered().answer for line in lines]):
        shown.add_row(str(row.k), *_cells(row))
    return shown


def _of_sources(sources: dict[str, list[AnswerLine]]) -> Table:
    shown = _table("source", "prompts", "k", "avg@k", "pass@k", "maj@k")
    for source, lines in sources.items():
        last = table([line.answered().answer for line in lines])[-1]
        num_prompts = len({line.prompt_id for line in lines})
        shown.add_row(Text(source), f"{num_prompts:,}", str(last.k), *_cells(last))
    return shown


def _by_source(lines: Sequence[AnswerLine]) -> dict[str, list[AnswerLine]]:
    sources: dict[str, list[AnswerLine]] = defaultdict(list)
    for line in lines:
        sources[line.source].append(line)
    return dict(sorted(sources.items()))


def _cells(row: AtK) -> tuple[str, str, str]:
    error = "" if math.isnan(row.avg_stderr) else f" ± {row.avg_stderr:.3f}"
    return f"{row.avg:.3f}{error}", f"{row.pass_:.3f}", "-" if row.maj is None else f"{row.maj:.3f}"


def _described(name: str, lines: Sequence[AnswerLine]) -> str:
    num_prompts = len({line.prompt_id for line in lines})
    lengths = [line.num_tokens for line in lines]
    truncated = fmean(line.finish_reason == "length" for line in lines)
    num_failed = sum(line.failed for line in lines)
    failed = f"; {num_failed:,} weren't judged and count as wrong" if num_failed else ""
    return (
        f"{name}: {len(lines):,} answers to {num_prompts:,} prompts, accuracy {fmean(line.acc for line in lines):.3f}, "
        f"{fmean(lengths):,.1f} tokens on average, {max(lengths):,} at most, {truncated:.1%} truncated{failed}"
    )


def _table(*headings: str) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        shown.add_column(heading, no_wrap=heading != "source", justify="left" if heading == "source" else "right")
    return shown
