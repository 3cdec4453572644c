"""Checkpoints for tests, written in one go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from asyncdapo.learner.storage.checkpoint import begin_checkpoint, commit_checkpoint


def write_checkpoint(
    run_dir: Path, step: int, branch: int, write: Callable[[Path], object], counters: Mapping[str, int] | None = None
) -> Path:
    """Whose files are what `write` puts into the directory that it gets."""
    write(begin_checkpoint(run_dir, step))
    return commit_checkpoint(run_dir, step, branch, counters=counters)
