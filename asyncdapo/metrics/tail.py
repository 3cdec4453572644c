"""Reads metrics.jsonl of a run again and again, as it grows.

In: RUN_DIR/metrics.jsonl, which a live run appends to, and replaces when it rolls back or amends its last line. Out:
its lines. An update reads only what is new; a replaced file is read from its beginning. Invariant: an update leaves the
lines that were whole in the file when it began. Does not own: what the lines mean.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from asyncdapo.metrics.jsonl import FILE_NAME, parse_line, to_metrics


class MetricsTail:
    """The lines of one run. The file may be missing at first."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self._file: BinaryIO | None = None
        """Open as long as it is the file of that name, so that no other file gets its inode."""
        self._unfinished = b""
        self.lines: list[dict[str, float]] = []
        """By step, rising; null as NaN."""

    def update(self) -> bool:
        """Read what is new. Returns whether there was anything."""
        replaced = self._follow()
        if self._file is None:
            return replaced
        new = self._unfinished + self._file.read()
        *whole, self._unfinished = new.split(b"\n")
        records = [parse_line(text.decode(errors="replace")) for text in whole]
        self.lines += [to_metrics(record) for record in records if record is not None]
        return replaced or bool(whole)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _follow(self) -> bool:
        """Turn to the file that has the name now. Returns whether that is another one than before."""
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False
        if self._file is not None and os.path.samestat(there, os.fstat(self._file.fileno())):
            return False
        self.close()
        self._file, self._unfinished = self._path.open("rb"), b""
        self.lines.clear()
        return True
