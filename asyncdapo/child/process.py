"""A process that runs the user's code: start it, talk to it over a socket pair, kill it with all that it started.

In: a command, bytes to send. Out: received bytes (to a subclass), its output (to the log, line by line), how it ended.
Invariant: every end passes `_note_end` once. Afterwards no process is left that it started, in whatever session: all of
them inherit the variable `MARK`, unless they clear their environment. When memory runs out, the kernel kills these
processes first. Does not own: what is said, time-outs, what becomes of the work of a process that ended. Linux kills a
child when the *thread* that started it ends; here that is the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import psutil

from asyncdapo.errors import RunError

START_TIMEOUT_S = 60.0
"""Time to import the user's modules."""
EXIT_GRACE_S = 1.0
"""Time for a process to end by itself; then it is killed."""
KILL_TIMEOUT_S = 10.0
POLL_S = 0.002
OUTPUT_GRACE_S = 0.2
NUM_LAST_LINES = 5
MAX_LINE_BYTES = 4096
FIRST_TO_GO = "1000"
"""The highest score for the kernel's out-of-memory killer: what eats all memory is not to cost the worker its life."""
MARK = "ASYNCDAPO_CHILD"
"""Environment variable of a process and all that it starts."""
MAX_SWEEPS = 100
"""Looks for processes left behind, until one finds none. They may be starting others."""
EXEC_S = 5.0
"""A process as young as this may be in the middle of its `exec`."""
KERNEL = 2
"""Linux's parent of kernel threads, which have no environment."""


class Output(asyncio.Protocol):
    """Standard output and error of a process: every line is logged, the last ones are kept."""

    def __init__(self, name: str, log: logging.Logger) -> None:
        self._name, self._log = name, log
        self._unfinished = b""
        self.last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self.ended = asyncio.Event()
        self._transport: asyncio.ReadTransport | None = None

    def connection_made(self, transport: asyncio.ReadTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        if len(self._unfinished) > MAX_LINE_BYTES:
            lines, self._unfinished = [*lines, self._unfinished], b""
        for line in lines:
            self._take(line)

    def connection_lost(self, error: Exception | None) -> None:
        self._take(self._unfinished)
        self.ended.set()

    def close(self) -> None:
        """Stop reading, even if some process still holds the other end."""
        if self._transport is not None:
            self._transport.close()

    def _take(self, line: bytes) -> None:
        text = line[:MAX_LINE_BYTES].decode(errors="replace").rstrip()
        if text:
            self.last_lines.append(text)
            self._log.info("%s: %s", self._name, text)


@dataclass(frozen=True)
class Launched:
    """A process of the operating system, and the value of its `MARK`."""

    popen: subprocess.Popen[bytes]
    mark: str


class ChildProcess(asyncio.Protocol):
    """One process from its start to its end. A subclass handles `data_received` and `release`."""

    def __init__(self, launched: Launched, kind: str, log: logging.Logger) -> None:
        popen = launched.popen
        self.pid = popen.pid
        self.alive = True
        """Whether it can be talked to."""
        self.killed_for: str | None = None
        """Why it was killed by us; None: it wasn't. Empty: through no fault of its own."""
        self._popen, self._mark = popen, launched.mark
        self._output = Output(f"{kind} {popen.pid}", log)
        self._transport: asyncio.Transport | None = None
        self._reaping: asyncio.Task[None] | None = None
        """Cleans up, once the process can't be talked to any more."""
        self._exit: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @classmethod
    async def connected(cls, make: Callable[[Launched], Self], command: Sequence[str]) -> Self:
        """The started process, its standard input our socket. Raises RunError if the system can't start it."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with theirs:
            process = make(_launch(command, theirs))
        try:
            await loop.create_unix_connection(lambda: process, sock=ours)
            await loop.connect_read_pipe(lambda: process._output, process._popen.stdout)
        except BaseException:
            process.kill()
            raise
        return process

    @property
    def last_lines(self) -> list[str]:
        """The last lines of its output."""
        return list(self._output.last_lines)

    def send(self, data: bytes) -> None:
        """Never blocks. A process that has ended gets nothing."""
        if self.alive and self._transport is not None:
            self._transport.write(data)

    def kill(self, why: str = "") -> None:
        """Kill it and all that it started; returns before it is gone. `why`: its fault; empty if it has none."""
        if self.alive:
            self.killed_for = why
        self._kill_group()
        self._note_end()

    async def end(self) -> str:
        """End it, gracefully if possible, and wait until it is gone. Returns how it ended."""
        self._note_end()
        return await asyncio.shield(self._exit)

    def release(self) -> None:
        """Called once, when the process can't be talked to any more: end every wait for its answers."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._note_end()

    def _note_end(self) -> None:
        """Every end passes here, once: release whoever waits for an answer, then clean up."""
        if not self.alive:
            return
        self.alive = False
        if self._transport is not None:
            self._transport.close()
        self.release()
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        now = asyncio.get_running_loop().time
        kill_at = now() + EXIT_GRACE_S
        while not self._has_exited() and now() < kill_at + KILL_TIMEOUT_S:
            if now() >= kill_at:
                self._kill_group()
            await asyncio.sleep(POLL_S)
        self._kill_group()  # processes that the user's code started
        await asyncio.to_thread(_kill_marked, self._mark)
        with suppress(TimeoutError):
            async with asyncio.timeout(OUTPUT_GRACE_S):
                await self._output.ended.wait()
        self._output.close()
        self._exit.set_result(_describe_exit(self._popen.poll()))

    def _has_exited(self) -> bool:
        """Whether it has exited. Doesn't reap it: until then its pid isn't reused, so the group can be killed by id."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # something else in this process reaps all children
            return True

    def _kill_group(self) -> None:
        if self._popen.returncode is None:
            with suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies can't be killed
                os.killpg(self.pid, signal.SIGKILL)


def _launch(command: Sequence[str], standard_input: socket.socket) -> Launched:
    """Start it without a fork of our own memory and threads. Raises RunError if the system can't start a process."""
    mark = secrets.token_hex(8)
    try:
        popen = subprocess.Popen(
            command,
            stdin=standard_input.fileno(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {MARK: mark},
        )
    except OSError as error:
        raise RunError(f"{command[0]}: {error.strerror}") from error
    with suppress(OSError), open(f"/proc/{popen.pid}/oom_score_adj", "w") as file:  # not there, or not ours to write
        file.write(FIRST_TO_GO)
    return Launched(popen, mark)


def _kill_marked(mark: str) -> None:
    """Kill what has the mark, wherever its session or parent."""
    for _ in range(MAX_SWEEPS):
        marks = [(process, _mark_of(process)) for process in psutil.process_iter()]
        found = [process for process, its_mark in marks if its_mark == mark]
        if not found and not any(its_mark == "" for _, its_mark in marks):
            return
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(POLL_S)


def _mark_of(process: psutil.Process) -> str | None:
    """Its mark, None for a process without; empty if that isn't known yet. In the middle of an `exec`, the kernel shows
    no environment."""
    try:
        if environment := process.environ():
            return environment.get(MARK)
        is_starting = time.time() - process.create_time() < EXEC_S and process.uids().real == os.getuid()
        return "" if is_starting and process.ppid() != KERNEL and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, OSError):  # gone, a zombie, or another user's
        return None


def _describe_exit(code: int | None) -> str:
    if code is None:
        return f"not gone {KILL_TIMEOUT_S:g} s after SIGKILL"
    if code >= 0:
        return f"ended with exit code {code}"
    name = {number.value: number.name for number in signal.Signals}.get(-code, f"signal {-code}")
    return f"killed by {name}" + (" (by hand, or because memory ran out)" if name == "SIGKILL" else "")
