"""The reaper: a small process that ends all others of a run when the driver is gone, however it went.

Ray ends its actors when their driver dies, but its agents wait for a dead server for over a minute first. The reaper
watches the driver's descendants while it lives; at the end of its standard input, which is the driver's death or its
good end, it grants `GRACE_S` and then kills what is left. A process is known by pid and start time, so that a number
that was given to another since is left alone. It heeds no Ctrl-C, which a terminal sends to it, too.

Where there is no /proc it does nothing; the processes then end when Ray ends them.
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
from pathlib import Path

from asyncdapo.controller.process.procfs import read_stat

PR_SET_CHILD_SUBREAPER = 36
LOOK_S = 0.2
GRACE_S = 3.0
SWEEP_S = 3.0

Known = tuple[int, str]
"""Pid and start time."""


@contextmanager
def reaper() -> Iterator[None]:
    """Watched by a reaper. At the end it looks after what is left and goes."""
    with subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, close_fds=True) as process:
        try:
            yield
        finally:
            process.stdin.close()


def adopt_orphans(adopt: bool) -> None:
    """Whether processes below this one whose parent has died become its own children, so that the reaper sees them.
    Not for long: it would have to bury them, too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(adopt))


def main() -> None:
    """Watch the parent until standard input ends, then clean up."""
    for heeded in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(heeded, signal.SIG_IGN)
    driver, known = os.getppid(), set()
    while not select.select([sys.stdin], [], [], LOOK_S)[0]:
        known = still_there(known | descendants(driver))
    known |= descendants(driver)
    known.discard((os.getpid(), start_time(os.getpid())))
    known = wait_for(known, GRACE_S)
    deadline = time.monotonic() + SWEEP_S
    while known and time.monotonic() < deadline:
        for pid, _ in known:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        known = wait_for(known, LOOK_S)


def wait_for(processes: set[Known], seconds: float) -> set[Known]:
    """Until all of them are gone, or the time is up. Returns those that aren't, with what they started meanwhile."""
    deadline = time.monotonic() + seconds
    while (processes := still_there(processes)) and time.monotonic() < deadline:
        processes |= {process for pid, _ in processes for process in descendants(pid)}
        time.sleep(0.05)
    return processes


def still_there(processes: set[Known]) -> set[Known]:
    return {process for process in processes if is_alive(process)}


def descendants(pid: int) -> set[Known]:
    """Every process below this one."""
    found: set[Known] = set()
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, tasks.read_text().split()):
                if started := start_time(child):
                    found |= {(child, started)} | descendants(child)
    return found


def is_alive(process: Known) -> bool:
    """The same process, and no zombie."""
    pid, started = process
    return start_time(pid) == started


def start_time(pid: int) -> str:
    """As the kernel says it; empty for one that is gone or a zombie."""
    stat = read_stat(pid)
    return "" if stat is None or stat.dead else str(stat.started)


if __name__ == "__main__":
    main()
