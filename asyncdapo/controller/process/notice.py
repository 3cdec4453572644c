"""Notice: a SIGTERM asks a process of the run to leave, as schedulers send it before they take a node away.

In: the signal. Out: whether it has come. Python's own handlers run in the main thread, which is Ray's in an actor, and
where Ray ends the process at once. The handler of `faulthandler` is C, may be registered in any thread, and writes a
traceback; here into a pipe, which is read whenever somebody asks. Does not own: what follows (`fleet/elastic`).
"""

from __future__ import annotations

import faulthandler
import os
import signal
from contextlib import suppress


class LeaveNotice:
    """Of the calling process, from now on."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        faulthandler.register(signal.SIGTERM, file=self._write, all_threads=False)
        self._has_come = False

    @property
    def has_come(self) -> bool:
        """Whether the process was asked to leave."""
        with suppress(BlockingIOError):
            self._has_come |= bool(os.read(self._read, 1))
        return self._has_come
