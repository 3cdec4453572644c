"""`asyncdapo eval CHECKPOINT`: from a model and data to a table, every answer, and a page to read them.

    CHECKPOINT ─▶ subject ─▶ config ─▶ OUT/eval.json ─▶ run ─▶ OUT/answers.jsonl ─▶ table
                (subject)   (settings)    (record)    (alone)                 (table)

The same command goes on where it was interrupted, and prints the table again when nothing is missing. Exit codes as of
every command.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from asyncdapo.config.config import Config
from asyncdapo.controller.eval.answers import ANSWERS_FILE
from asyncdapo.controller.eval.lines import read_lines
from asyncdapo.controller.eval.record import hold_directory
from asyncdapo.controller.eval.settings import Wanted, make_config
from asyncdapo.controller.eval.subject import Subject, find_subject
from asyncdapo.controller.eval.table import print_results


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
