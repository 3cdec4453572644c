"""Writes files atomically, lets one process at a time write, and turns disk failures into one line with the fix.

In: the content of a file; a block that writes one; the path of a lock file. Out: the file, replaced atomically. A disk
failure, reported by the operating system, by SQLite, or by a library on top of them, becomes a `DiskError`, which ends
the run; other errors pass. A lock, or the pid of its holder. Invariant: a lock is the kernel's (flock), so it ends with
its process, and a lock file that was left behind means nothing. Does not own: what is written or locked.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from asyncdapo.errors import DiskError

DISK_FAILURES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
"""SQLite's primary result codes (the low byte of its error codes) for disk failures."""
READ_BYTES = 64 << 20
"""Digested at a time."""
RETRY_S = 0.05
"""Time between two attempts to take a lock."""


class LockedError(Exception):
    """Another process holds the lock; the message is its pid."""


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


def sha256_of(path: Path, offset: int = 0, num_bytes: int | None = None) -> str:
    """Digest of a file, or of so many of its bytes, whatever its size."""
    digest, left = hashlib.sha256(), path.stat().st_size if num_bytes is None else num_bytes
    with path.open("rb") as file:
        file.seek(offset)
        while left and (content := file.read(min(left, READ_BYTES))):
            digest.update(content)
            left -= len(content)
    return digest.hexdigest()


def lock_file(path: Path, wait_s: float = 0.0) -> IO[str]:
    """Hold the lock until the returned file is closed, at the latest with this process. Raises LockedError when another
    process still holds it after `wait_s`."""
    file = path.open("a+", encoding="utf-8")
    deadline = time.monotonic() + wait_s
    while not _is_locked_by(file):
        if time.monotonic() >= deadline:
            with file:
                file.seek(0)
                raise LockedError(file.read().strip() or "unknown")
        time.sleep(RETRY_S)
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _is_locked_by(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
