"""One writer: whoever writes `RUN_DIR/ledger.db` holds a lock on `RUN_DIR/ledger.lock` for as long as it does.

The lock is the kernel's (flock): it goes with the process, however that dies, and a file left behind means nothing. Two
replay servers of one run, or two runs in one directory, so never write at the same time. A successor waits a while for
a predecessor that is dying. Does not own: readers, which need no lock.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from asyncdapo.errors import RunError

LOCK_FILE = "ledger.lock"
LOCK_WAIT_S = 30.0
_RETRY_S = 0.05


class WriterLock:
    """Held from its making until `release` or the end of the process."""

    def __init__(self, run_dir: Path, wait_s: float = LOCK_WAIT_S) -> None:
        """Raises RunError when another process keeps the lock for longer than `wait_s`."""
        path = run_dir / LOCK_FILE
        self._file = path.open("a+")
        deadline = time.monotonic() + wait_s
        while not self._taken():
            if time.monotonic() > deadline:
                self._file.seek(0)
                holder = self._file.read().strip() or "unknown"
                self._file.close()
                raise RunError(
                    f"{path}: process {holder} writes this run's ledger, and did so for {wait_s:g} s "
                    "(`asyncdapo ps` shows a run that is going on; end it, or choose another run.dir)"
                )
            time.sleep(_RETRY_S)
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        self._file.close()
