"""What a process is doing: the stacks of its threads and of its asyncio tasks.

    it answers              its actor calls `stacks()`: threads, and each task down to what it awaits
    it doesn't answer       `ask(entry, log)`: SIGUSR1, whose handler writes the threads' stacks to the process's log
    (GIL held, loop         without needing the GIL; what was added to the log comes back
    blocked)
    it can't run at all     `ask` says why: stopped, zombie, gone

In: a process. Out: text for a person. Invariant: only a process that has installed the handler is signalled, since any
other would die of SIGUSR1. Does not own: whose stacks are wanted (`waits.processes_in`).
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from asyncdapo.controller.process.roster import ENDED, GONE, STOPPED, Entry, state_of

DUMP_S = 3.0
"""Time for a dump to appear; a process inside a system call that can't be interrupted never writes it."""
QUIET_S = 0.1
"""A dump is over when nothing was added for this long."""
POLL_S = 0.02
DUMP_MARK = "(most recent call first):"
"""In the first line of every thread's stack: other lines of the log may come in between."""


def install(log_file: TextIO) -> None:
    """From now on SIGUSR1 writes the stacks of all threads to `log_file`, which has to stay open."""
    faulthandler.register(signal.SIGUSR1, file=log_file, all_threads=True, chain=False)


# -------------------------------------------------------------------------------------------------- of this process


def stacks(loop: asyncio.AbstractEventLoop | None = None) -> str:
    """All threads of this process, then the tasks of `loop` (default: the running one, if this is called in one)."""
    if loop is None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no loop runs in this thread: there are no tasks to show
            return _thread_stacks()
    return "\n".join([_thread_stacks(), *_task_stacks(loop)])


def _thread_stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, 'not of Python')}:\n{_format(traceback.walk_stack(frame), innermost_first=True)}"
        for ident, frame in sys._current_frames().items()
    )


def _task_stacks(loop: asyncio.AbstractEventLoop) -> Iterable[str]:
    for task in sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name()):
        coroutine = task.get_coro()
        where = _format((frame, frame.f_lineno) for frame in _awaited_frames(coroutine))
        yield f"task {task.get_name()} {getattr(coroutine, '__qualname__', coroutine)}:\n{where}"


def _awaited_frames(coroutine: Any) -> Iterable[FrameType]:
    """From the task's own coroutine down the chain of awaits; `Task.get_stack` gives the first of these only."""
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is None:
            return  # a future, or an object of C: nothing more to see
        yield frame
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)


def _format(frames: Iterable[tuple[FrameType, int]], innermost_first: bool = False) -> str:
    summary = traceback.StackSummary.extract(frames)
    if innermost_first:
        summary.reverse()
    return "".join(summary.format()).rstrip("\n")


# ------------------------------------------------------------------------------- of one that doesn't answer, same host


def ask(entry: Entry, log_path: Path, wait_s: float = DUMP_S) -> str:
    """The stacks of a process's threads, or one line that says why there are none. Blocks up to `wait_s`."""
    offset = log_path.stat().st_size if log_path.exists() else 0
    if why_not := request_stacks(entry):
        return f"{entry.name}: {why_not}"
    deadline, quiet_at, dump = time.monotonic() + wait_s, time.monotonic(), ""
    while time.monotonic() < deadline and not (DUMP_MARK in dump and time.monotonic() - quiet_at > QUIET_S):
        time.sleep(POLL_S)
        if (added := collect(log_path, offset)) != dump:
            dump, quiet_at = added, time.monotonic()
    return dump if DUMP_MARK in dump else f"{entry.name}: no stacks within {wait_s:g} s: it is {state_of(entry)}"


def request_stacks(entry: Entry) -> str:
    """Have the process write its stacks to its log. Returns why it can't, or nothing."""
    state = state_of(entry)
    if state in (*ENDED, *STOPPED):
        return f"it is {state}"
    if not _handles_signal(entry.pid, signal.SIGUSR1):
        return "has not installed the handler of SIGUSR1"
    try:
        os.kill(entry.pid, signal.SIGUSR1)
    except ProcessLookupError:
        return f"it is {GONE}"
    return ""


def _handles_signal(pid: int, signal: int) -> bool:
    """Whether the process has a handler of its own for this signal, and so won't die of it. psutil doesn't know; where
    there is no /proc (macOS) no process counts as one that has."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # the second when it ends between open and read
        return False
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(mask >> (signal - 1) & 1)


def collect(log_path: Path, offset: int) -> str:
    """What was added to a log since it was `offset` bytes long."""
    if not log_path.exists():
        return ""
    with log_path.open("rb") as log:
        log.seek(offset)
        return log.read().decode(errors="replace")
