"""Checkpoint directories: whole or absent, the newest few kept.

    RUN_DIR/checkpoints/step-000036/    config.json, model.safetensors, tokenizer files, learner.pt

What is in one is written by a function that gets an empty directory; this module makes it appear under its name at once
(everything on disk first, then one rename) and removes old ones. Names that begin with a dot are unfinished or on their
way out, left by a process that died; the next write removes them. Invariant: one writer per run directory.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

STEP_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands once it is whole."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def write_checkpoint(run_dir: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Fill a directory with `write` and give it the checkpoint's name; one of the same step is replaced."""
    final = checkpoint_dir(run_dir, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(final.parent)
    unfinished = final.with_name(f".{final.name}.new")
    unfinished.mkdir()
    write(unfinished)
    _sync_tree(unfinished)
    if final.exists():
        _remove(final)
    unfinished.rename(final)
    _sync(final.parent)
    return final


def remove_old_checkpoints(run_dir: Path, keep: int) -> None:
    """Keep step 0 and the `keep` newest others; 0 keeps all."""
    if keep == 0:
        return
    names = (path.name for path in (run_dir / "checkpoints").iterdir())
    steps = sorted(int(match[1]) for match in map(STEP_NAME.fullmatch, names) if match)
    for step in [step for step in steps if step > 0][:-keep]:
        _remove(checkpoint_dir(run_dir, step))


def _remove(directory: Path) -> None:
    """Take the name away first, so that a directory with a checkpoint's name is never half there."""
    leaving = directory.with_name(f".{directory.name}.old")
    directory.rename(leaving)
    shutil.rmtree(leaving)


def _remove_unfinished(parent: Path) -> None:
    for path in parent.glob(".step-*"):
        shutil.rmtree(path)


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    """Wait until the file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
