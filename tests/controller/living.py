"""Real processes for the tests of who is who: started here, ended here."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SLEEP = "import time; print('ready', flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP


@contextmanager
def living(code: str = SLEEP, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `code` and has printed its first line; killed at the end if it still lives."""
    process = subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def eventually(condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
    return value
