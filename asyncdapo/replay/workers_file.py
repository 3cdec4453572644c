"""RUN_DIR/workers.json: what the replay server heard from each worker last, for who watches the run from its files.

In: rows. Out: the file, replaced as a whole, so a reader sees the rows before or those after. Not synced: the next look
writes it again. Does not own: which workers are lost (`sessions`), which processes there are (`roster`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

FILE_NAME = "workers.json"


class WorkerRow(msgspec.Struct, kw_only=True, frozen=True):
    """One worker. None and NaN stand for what isn't known."""

    worker: int
    heard_at_s: float
    """When its last heartbeat came, in seconds since 1970, to within a heartbeat."""
    leases: int
    tokens_per_s: float | None = None
    """While it has a lease, over its latest heartbeats; the others the same."""
    running: float | None = None
    """Slots in use."""
    waiting: float | None = None
    """Sequences without a slot."""


def write_rows(run_dir: Path, rows: Sequence[WorkerRow]) -> None:
    """Replace the file."""
    unfinished = run_dir / f".{FILE_NAME}.new"
    unfinished.write_bytes(msgspec.json.encode(rows))
    unfinished.replace(run_dir / FILE_NAME)


def read_rows(run_dir: Path) -> dict[int, WorkerRow]:
    """By worker; empty without the file."""
    try:
        content = (run_dir / FILE_NAME).read_bytes()
    except FileNotFoundError:
        return {}
    return {row.worker: row for row in msgspec.json.decode(content, type=list[WorkerRow])}
