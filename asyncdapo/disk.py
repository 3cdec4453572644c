"""Files that are on disk, whole or as they were before; what a disk refuses, in one line with the file and what to do.

In: the content of a file; a block that writes one. Out: the file, replaced at once; `DiskError`, which ends the run, in
place of what the operating system, SQLite, or a library that met such an error raises; other errors
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
"""What SQLite says of a disk, in the low byte of its error codes."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """While `path` is written. Raises DiskError."""
    try:
        yield
    except Exception as error:
        if problem := _problem(error):
            fix = "make room on this disk, or mend it, and launch the run again"
            raise DiskError(f"{path}: can't be written: {problem} ({fix})") from error
        raise


def replace_file(path: Path, content: bytes) -> None:
    """The file has this content, or what it had before; nothing between, whatever dies when, and be it the power."""
    unfinished = path.with_name(f".{path.name}.new")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the file is on disk; of a directory, the names in it."""
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
    """What the disk said; nothing when it wasn't the disk."""
    match error:
        case None:
            return ""
        case OSError():
            return error.strerror or str(error)
        case sqlite3.OperationalError() if error.sqlite_errorcode & 0xFF in DISK_FAILURES:
            return str(error)
    return _problem(error.__context__)  # `torch.save` raises its own while it handles that of the file
