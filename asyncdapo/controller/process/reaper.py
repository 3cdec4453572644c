"""The reaper: a small process that kills what is left of a run after its driver has ended or died.

Ray ends its actors when their driver dies, but its agents wait for a dead server for over a minute first. The reaper
collects the driver's descendants while the driver lives. Its standard input is closed when the driver ends; the reaper
then waits for `GRACE_S` and kills the processes that are left. psutil identifies a process by pid and start time, so a
process that got a reused pid is not killed. The reaper ignores Ctrl-C, which a terminal sends to it, too.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

PR_SET_CHILD_SUBREAPER = 36
LOOK_S = 1.0
GRACE_S = 3.0
SWEEP_S = 3.0


@contextmanager
def reaper() -> Iterator[None]:
    """A reaper watches this process and its descendants while the body runs. Afterwards it kills what is left."""
    command = [sys.executable, "-m", __name__, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, close_fds=True) as process:
        try:
            yield
        finally:
            assert process.stdin is not None, "a pipe was asked for"
            process.stdin.close()


def adopt_orphans(adopt: bool) -> None:
    """Whether processes below this one become its children when their parent dies, so that the reaper sees them. Switch
    it on for a short time only: this process doesn't wait for them, so they stay zombies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(adopt))


def main(driver: int) -> None:
    """Watch the process of this pid until standard input ends, then clean up. Not `os.getppid()`: that is the system's
    first process if the driver has died before this one is up."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    known = descendants(driver)
    while not select.select([sys.stdin], [], [], LOOK_S)[0]:
        known = still_there(known | descendants(driver))
    known |= descendants(driver)
    known.discard(psutil.Process())
    known = wait_for(known, GRACE_S)
    deadline = time.monotonic() + SWEEP_S
    while known and time.monotonic() < deadline:
        for process in known:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        known = wait_for(known, LOOK_S)


def wait_for(processes: set[psutil.Process], seconds: float) -> set[psutil.Process]:
    """Wait until all have ended, or the time is up. Returns those that live, and what they have started since."""
    deadline = time.monotonic() + seconds
    while (processes := still_there(processes)) and time.monotonic() < deadline:
        processes |= {below for process in processes for below in descendants(process.pid)}
        time.sleep(0.05)
    return processes


def still_there(processes: set[psutil.Process]) -> set[psutil.Process]:
    """Those that live; a zombie doesn't."""
    return {process for process in processes if is_alive(process)}


def descendants(pid: int) -> set[psutil.Process]:
    """Every process below this one, zombies included."""
    with suppress(psutil.NoSuchProcess):
        return set(psutil.Process(pid).children(recursive=True))
    return set()


def is_alive(process: psutil.Process) -> bool:
    """The same process, and no zombie."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


if __name__ == "__main__":
    main(int(sys.argv[1]))
