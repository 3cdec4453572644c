"""Roster: `RUN_DIR/processes.json`, every process of a run, kept current by the controller.

    [
    {"role":"controller","index":0,"pid":4711,"host":"node-1","started":1767323045.17},
    {"role":"rollout","index":1,"pid":4790,"host":"node-1","started":1767323049.02},
    ...

In: the entries that each process reports of itself and of the processes it started (`this_process`, `entry_of`). Out:
the file, replaced atomically after each change; at the next launch, the processes of the last one that still live.
Invariant: a process is signalled only if host, pid and start time are those of its entry, so a process that got a
reused pid is safe. Does not own: starting and watching processes (`fleet/process`), how the list is shown (`ps`).
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from asyncdapo.disk import disk_errors, replace_file
from asyncdapo.errors import RunError, UserError
from asyncdapo.transport.backend import HOST_ID

FILE_NAME = "processes.json"
ROLES = ("controller", "replay", "rollout", "engine", "scorer", "host", "learner")

SAME_START_S = 2.0
"""Start times within this are the same: a leap second moves them all by one."""
BOOT_TIME_S = psutil.boot_time()
"""Seconds since 1970. Read once: whoever sets the clock during a run moves what the kernel says of it."""
OTHER_HOST, GONE = "other host", "gone"
"""States of a process that this host knows nothing of."""
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
"""States by SIGSTOP or a debugger: alive, and unable to do anything."""
ENDED = (OTHER_HOST, GONE, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
"""States of a process that doesn't live on this host. Of a zombie only the pid is left."""
KILLED_S = 10.0
"""Time for a killed process to be gone: a lot of memory takes a while to be freed."""
POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One process of a run."""

    role: str
    index: int
    """Counts the processes of a role from 0."""
    pid: int
    host: str
    started: float
    """Seconds since 1970, as the kernel says it; with `pid` it names one process for good."""

    @property
    def name(self) -> str:
        """As in logs and errors: `learner`, `rollout-1`."""
        return process_name(self.role, self.index)


def process_name(role: str, index: int = 0) -> str:
    """The name of a process: `replay`, `rollout-1`, `learner` (its rank 0), `learner-1`."""
    numbered = role in ("rollout", "engine", "scorer", "host") or (role == "learner" and index)
    return f"{role}-{index}" if numbered else role


def this_host() -> str:
    """The name of this machine, with the value of `HOST_ID` behind it where that is set: stand-in nodes have one each,
    so that none of them reaches a process of another one by its pid."""
    return "/".join(filter(None, [socket.gethostname(), os.environ.get(HOST_ID)]))


def this_process(role: str, index: int = 0) -> Entry:
    """The entry of the calling process."""
    return entry_of(role, index, os.getpid())


def entry_of(role: str, index: int, pid: int) -> Entry:
    """The entry of a process on this host. The start of one that has ended by now is this moment."""
    started = time.time()
    with suppress(psutil.NoSuchProcess):
        started = _started(psutil.Process(pid))
    return Entry(role=role, index=index, pid=pid, host=this_host(), started=round(started, 2))


class Roster:
    """The processes of a launch; the file is that of the former launch until the first `set`."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self._entries: dict[str, tuple[Entry, ...]] = {}
        self._written = ""

    def set(self, owner: str, entries: Iterable[Entry]) -> None:
        """What the process named `owner` reports: itself and those it started, in place of what it reported before."""
        self._entries[owner] = tuple(entries)
        self._write()

    def of(self, owner: str) -> list[Entry]:
        """What `owner` reported last: itself, and the processes it started, which may outlive it (see `end`)."""
        return list(self._entries.get(owner, ()))

    def remove(self, owner: str) -> None:
        """`owner` has ended, and all that it started."""
        self._entries.pop(owner, None)
        self._write()

    def entries(self) -> list[Entry]:
        """All of them, by role and index."""
        every = (entry for entries in self._entries.values() for entry in entries)
        return sorted(every, key=lambda entry: (ROLES.index(entry.role), entry.index))

    def _write(self) -> None:
        """Replace the file in one rename, so that a reader sees the old list or the new one. Raises DiskError."""
        text = "[\n" + ",\n".join(msgspec.json.encode(entry).decode() for entry in self.entries()) + "\n]\n"
        if text == self._written:
            return
        with disk_errors(self._path):
            replace_file(self._path, text.encode())
        self._written = text


def read(run_dir: Path) -> list[Entry]:
    """The list as it stands. Raises FileNotFoundError where there is none, UserError for a file of another kind."""
    path = run_dir / FILE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Entry])
    except ValueError as error:
        raise UserError(
            f"{path} is not a list of processes: {error} (remove it when no process of that run lives)"
        ) from None


def state_of(entry: Entry) -> str:
    """psutil's word for what this very process does (`sleeping`, `stopped`, `zombie`, …), `gone` or `other host`."""
    if entry.host != this_host():
        return OTHER_HOST
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(entry.pid)
        if abs(_started(process) - entry.started) <= SAME_START_S:
            return process.status()
    return GONE


def _started(process: psutil.Process) -> float:
    """Seconds since 1970, the same for the whole life of the calling process."""
    return BOOT_TIME_S + process.create_time() - psutil.boot_time()


def is_running(entry: Entry) -> bool:
    """Whether this very process lives on this host. Stopped ones do, zombies don't."""
    return state_of(entry) not in ENDED


def survivors(run_dir: Path) -> list[Entry]:
    """Processes of a former launch that still live on this host."""
    if not (run_dir / FILE_NAME).exists():
        return []
    return [entry for entry in read(run_dir) if entry.pid != os.getpid() and is_running(entry)]


def end_survivors(run_dir: Path, wait_s: float) -> list[Entry]:
    """Before a launch on a used directory: wait for the former launch to be gone, then kill what is left of it.

    Returns those that it killed. Raises UserError for a process that can't be killed; also if the former controller
    lives, and then it kills none: that run continues.
    """
    former = survivors(run_dir)
    _wait_for_end(former, wait_s)
    for entry in former:
        if entry.role == "controller" and is_running(entry):
            raise UserError(
                f"run.dir: {run_dir} is in use by a run: its controller, process {entry.pid}, lives "
                f"(choose another run.dir, or end that run with `kill {entry.pid}`)"
            )
    try:
        return end(former)
    except RunError as error:
        raise UserError(f"{run_dir}: of the launch before: {error}") from error


def end(entries: Sequence[Entry], wait_s: float = 0.0) -> list[Entry]:
    """Wait for processes of this host to end, then kill the others. Returns those that it killed, after they are gone.
    Raises RunError that names those that can't be killed."""
    killed = []
    for entry in _wait_for_end(entries, wait_s):
        if is_running(entry):
            _kill(entry)
            killed.append(entry)
    if left := _wait_for_end(killed, KILLED_S):
        raise RunError(f"still there {KILLED_S:g} s after SIGKILL: {describe(left)}")
    return killed


def describe(entries: Sequence[Entry]) -> str:
    """For a line of a log: `rollout-1 (process 4790), learner (process 4802)`."""
    return ", ".join(f"{entry.name} (process {entry.pid})" for entry in entries)


def _wait_for_end(entries: Sequence[Entry], wait_s: float) -> list[Entry]:
    """Those of `entries` that still run when time is up."""
    deadline = time.monotonic() + wait_s
    while (running := [entry for entry in entries if is_running(entry)]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return running


def _kill(entry: Entry) -> None:
    try:
        os.kill(entry.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself just now
    except PermissionError:
        raise RunError(f"{describe([entry])} belongs to another user and still runs: end it there first") from None
