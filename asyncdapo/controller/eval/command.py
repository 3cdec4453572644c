"""`asyncdapo eval CHECKPOINT`: from a model and data to a table, every answer, and a page to read them.

    CHECKPOINT ─▶ subject ─▶ config ─▶ OUT/eval.json ─▶ run ─▶ OUT/answers.jsonl ─▶ table
                (subject)   (settings)    (record)    (alone)

After an interruption the same command asks for what is missing. When nothing is, it prints the table again. Exit codes
as of every command.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncdapo.config.config import Config
from asyncdapo.controller.eval.answers import ANSWERS_FILE, METRICS_FILE, PAGE_FILE
from asyncdapo.controller.eval.lines import AnswerLine, read_lines
from asyncdapo.controller.eval.record import hold_directory
from asyncdapo.controller.eval.sampled import AtK, table
from asyncdapo.controller.eval.settings import Wanted, make_config
from asyncdapo.controller.eval.subject import Subject, find_subject

MAX_SOURCES = 20
"""With more of them (a source for every row) there is no table of sources."""


def command(args: argparse.Namespace) -> int:
    """Returns the exit code. Raises UserError before anything is sampled."""
    subject = find_subject(args.checkpoint)
    for problem in subject.problems:
        print(f"asyncdapo: not used: {problem}", file=sys.stderr)
    wanted = Wanted(
        data=args.data, samples=args.samples, config=args.config, out=args.out, overrides=tuple(args.overrides)
    )
    config = make_config(subject, wanted)
    out = _as_typed(Path(config.run.dir))
    with hold_directory(config, subject.step) as complete:
        if complete:
            print(f"{out} has all its answers; ask for more with --samples, or begin anew with another --out")
        else:
            print(_described(config, subject))
            # Ray's own report of a death, which ours says in a line; read when Ray is imported.
            os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
            from asyncdapo.controller.eval.alone import evaluate

            if code := evaluate(config, subject.step):
                return code
        print_results(list(read_lines(out / ANSWERS_FILE)), out)
    return 0


def _described(config: Config, subject: Subject) -> str:
    """What is asked of whom, at most: data may have fewer prompts."""
    num_samples, parts = config.eval.num_samples, []
    if num_prompts := config.eval.num_prompts:
        answers = "answer" if num_samples == 1 else "answers"
        parts.append(f"{num_samples:,} {answers} to each of {num_prompts:,} prompts")
    if num_greedy := config.eval.num_greedy_prompts:
        parts.append(f"greedy ones to {num_greedy:,}")
    return f"evaluates {_as_typed(Path(subject.model))}: {', '.join(parts)}"


def _as_typed(path: Path) -> Path:
    """Relative where it is below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# -------------------------------------------------------------------------------------------------------------- tables


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
            console.print(_summary(name, some), soft_wrap=True)
    files = ", ".join((ANSWERS_FILE, METRICS_FILE, PAGE_FILE))
    console.print(f"{out}: {files}", soft_wrap=True, markup=False)


def _by_k(lines: Sequence[AnswerLine]) -> Table:
    shown = _grid("k", "avg@k", "pass@k", "maj@k")
    for row in table([line.answered().answer for line in lines]):
        shown.add_row(str(row.k), *_cells(row))
    return shown


def _of_sources(sources: dict[str, list[AnswerLine]]) -> Table:
    shown = _grid("source", "prompts", "k", "avg@k", "pass@k", "maj@k")
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


def _summary(name: str, lines: Sequence[AnswerLine]) -> str:
    num_prompts = len({line.prompt_id for line in lines})
    lengths = [line.num_tokens for line in lines]
    truncated = fmean(line.finish_reason == "length" for line in lines)
    turns = [line.answered().answer.num_turns for line in lines]
    of_turns = f"{fmean(turns):.1f} turns and " if max(turns) > 1 else ""
    num_failed = sum(line.failed for line in lines)
    failed = f"; {num_failed:,} weren't judged and count as wrong" if num_failed else ""
    return (
        f"{name}: {len(lines):,} answers to {num_prompts:,} prompts, accuracy {fmean(line.acc for line in lines):.3f}, "
        f"{of_turns}"
        f"{fmean(lengths):,.1f} tokens on average, {max(lengths):,} at most, {truncated:.1%} truncated{failed}"
    )


def _grid(*headings: str) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        shown.add_column(heading, no_wrap=heading != "source", justify="left" if heading == "source" else "right")
    return shown
