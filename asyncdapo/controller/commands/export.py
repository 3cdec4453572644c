"""`asyncdapo export`: the model of a checkpoint, as a directory of its own that every Hugging Face program reads.

In: a run, or one of its checkpoints. Out: config, safetensors and tokenizer, copied file by file, in a directory that
appears whole or not at all. Every byte of the checkpoint is checked before. Does not own: what a checkpoint holds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from asyncdapo.controller.eval.subject import Subject, find_subject
from asyncdapo.disk import disk_errors
from asyncdapo.errors import DiskError, UserError
from asyncdapo.learner.storage.checkpoint import LEARNERS_OWN


def export(source: str, out: Path) -> Subject:
    """Copy the model of `source` (a run: its newest undamaged checkpoint) to the new directory `out`. Returns what was
    copied. Raises UserError where there is no such checkpoint, or it is damaged, or `out` is in use; DiskError."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is in use (give a new directory)")
    subject = find_subject(source)
    if subject.config is None:
        raise UserError(f"{source}: is neither a run nor a checkpoint of one (give RUN_DIR, or one of its checkpoints)")
    unfinished = out.with_name(f".{out.name}.new")
    with disk_errors(out):
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(subject.model, unfinished, ignore=shutil.ignore_patterns(*LEARNERS_OWN))
        unfinished.rename(out)
    return subject


def command(args: argparse.Namespace) -> int:
    """Export, and say what was exported. Returns the exit code."""
    try:
        subject = export(args.source, args.out)
    except DiskError as error:
        print(f"asyncdapo: {error}", file=sys.stderr)
        return 1
    for problem in subject.problems:
        print(f"not used: {problem}")
    num_bytes = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: the model of {subject.name}, {num_bytes / 2**20:.1f} MiB")
    return 0
