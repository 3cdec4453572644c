"""Writes files atomically, and turns disk failures into one line with the file and the fix.

In: the content of a file; a block that writes one. Out: the file, replaced atomically. A disk failure, reported by the
operating system, by SQLite, or by a library on top of them, becomes a `DiskError`, which ends the run; other errors
pass. Does not own: what is written.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asyncdapo.errors import DiskError

DISK_FAILURES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
"""SQLite's primary result codes (the low byte of its error codes) for disk failures."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Wraps a block that writes `path`. Raises DiskError."""
    try:
        yield
    except Exception as error:
        if problem := _problem(error):
            fix = "free space on this disk, or repair it, and launch the run again"
            raise DiskError(f"{path}: can't be written: {problem} ({fix})") from error
        raise


def replace_file(path: Path, content: bytes) -> None:
    """Replace the file's content atomically: after a crash or power failure it has either the new or the old
    content."""
    unfinished = path.with_name(f".{path.name}.new")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the file is on disk; for a directory, until the names in it are."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Digest of a whole file, whatever its size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem(error: BaseException | None) -> str:
    """The disk's error message; "" if the disk isn't the cause."""
    match error:
        case None:
            return ""
        case OSError():
            return error.strerror or str(error)
        case sqlite3.OperationalError() if error.sqlite_errorcode & 0xFF in DISK_FAILURES:
            return str(error)
    return _problem(error.__context__)  # `torch.save` raises its own error while it handles the file's
