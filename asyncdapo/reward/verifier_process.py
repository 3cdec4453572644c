"""A verifier process as its pool sees it: start it, ask it, end it.

In: texts to judge. Out: the process's verdicts, and how it ended. One request at a time. A process that takes too long
over one text is killed, and so is one whose request is cancelled: an answer can't be taken for that of another request.
Its main is `verifier_main`.

Owns: the operating system's process, its socket, its output (to the log, line by line). Does not own: texts that were
not judged (the pool). Linux kills a child when the *thread* that started it ends; here that is the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from asyncdapo.errors import RunError
from asyncdapo.reward.wire import Broken, FromProcess, NoVerdict, Raised, Ready, Request, Setup, Unpacker, Verdict, pack

START_TIMEOUT_S = 60.0
"""Time to import the user's modules."""
EXIT_GRACE_S = 1.0
"""Time for a process to end by itself; then it is killed."""
KILL_TIMEOUT_S = 10.0
POLL_S = 0.002
OUTPUT_GRACE_S = 0.2
NUM_LAST_LINES = 5
MAX_LINE_BYTES = 4096

log = logging.getLogger("reward")


class Output(asyncio.Protocol):
    """Standard output and error of a process: every line is logged, the last ones are kept."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
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
            log.info("verifier process %d: %s", self._pid, text)


@dataclass(kw_only=True)
class _Pending:
    """The request that the process is working on."""

    num_wanted: int
    timeout_s: float
    """For each answer."""
    heard_at: float
    """Time of the request, then of the latest answer."""
    timer: asyncio.TimerHandle
    over: asyncio.Future[None]
    said: list[FromProcess] = field(default_factory=list)


class VerifierProcess(asyncio.Protocol):
    """One process from its start to its end. Create it with `start`."""

    def __init__(self, popen: subprocess.Popen[bytes], on_verdict: Callable[[], None]) -> None:
        self.pid = popen.pid
        self.alive = True
        """Whether it takes requests."""
        self.timed_out = False
        """Killed because it took too long."""
        self.given_up = False
        """Killed because its request was cancelled."""
        self._popen = popen
        self._on_verdict = on_verdict
        self._output = Output(popen.pid)
        self._unpacker = Unpacker(FromProcess)
        self._transport: asyncio.Transport | None = None
        self._pending: _Pending | None = None
        self._reaping: asyncio.Task[None] | None = None
        """Cleans up, once the process doesn't take requests any more."""
        self._exit: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(cls, verifier: str, setup: Setup, on_verdict: Callable[[], None]) -> Self:
        """A process that has loaded the verifier. Raises RunError, with its last lines of output, if it can't.

        `on_verdict` is called at each verdict, as soon as it arrives.
        """
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with theirs:
            process = cls(_popen(verifier, theirs), on_verdict)
        try:
            await loop.create_unix_connection(lambda: process, sock=ours)
            await loop.connect_read_pipe(lambda: process._output, process._popen.stdout)
            said = await process.ask(setup, 1, START_TIMEOUT_S)
        except BaseException:
            process.kill()
            raise
        if said == [Ready()]:
            return process
        how = await process.end()
        if said and isinstance(said[0], Broken):
            raise RunError(said[0].problem)
        if process.timed_out:
            how = f"no answer in {START_TIMEOUT_S:g} s"
        raise RunError(": ".join([how, *process.last_lines]))

    @property
    def last_lines(self) -> list[str]:
        """The last lines of its output."""
        return list(self._output.last_lines)

    async def ask(self, message: Setup | Request, num_wanted: int, timeout_s: float) -> list[FromProcess]:
        """The process's answers, in order: fewer than `num_wanted` if the verifier raised or the process ended. The
        process is killed when an answer takes longer than `timeout_s` after the one before, and when the caller is
        cancelled."""
        if not self.alive:
            return []
        loop = asyncio.get_running_loop()
        pending = self._pending = _Pending(
            num_wanted=num_wanted,
            timeout_s=timeout_s,
            heard_at=loop.time(),
            timer=loop.call_later(timeout_s, self._check_time),
            over=loop.create_future(),
        )
        assert self._transport is not None, "`start` has connected it"
        self._transport.write(pack(message))
        try:
            await pending.over
            return pending.said
        except asyncio.CancelledError:
            self.given_up = True
            self.kill()
            raise
        finally:
            pending.timer.cancel()
            self._pending = None

    def kill(self) -> None:
        """Kill it and all that it started; returns before it is gone."""
        self._kill_group()
        self._note_end()

    async def end(self) -> str:
        """End it, gracefully if possible, and wait until it is gone. Returns how it ended."""
        self._note_end()
        return await asyncio.shield(self._exit)

    # ----------------------------------------------------------------------------------------- called by the event loop

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Handled here, not in a task: an event loop that was blocked then handles answers before time-outs."""
        for said in self._unpacker.feed(data):
            pending = self._pending
            if pending is None or pending.over.done():
                continue
            pending.said.append(said)
            pending.heard_at = asyncio.get_running_loop().time()
            if isinstance(said, Verdict):
                self._on_verdict()
            if len(pending.said) == pending.num_wanted or isinstance(said, Raised | NoVerdict):
                pending.over.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._note_end()

    # -------------------------------------------------------------------------------------------------------- its end

    def _check_time(self) -> None:
        loop, pending = asyncio.get_running_loop(), self._pending
        assert pending is not None, "a timer without a request"
        left_s = pending.heard_at + pending.timeout_s - loop.time()
        if left_s > 0:
            pending.timer = loop.call_later(left_s, self._check_time)
        else:
            self.timed_out = True
            self.kill()

    def _note_end(self) -> None:
        """Every end passes here, once: release whoever waits for an answer, then clean up."""
        if not self.alive:
            return
        self.alive = False
        if self._transport is not None:
            self._transport.close()
        if self._pending is not None and not self._pending.over.done():
            self._pending.over.set_result(None)
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        now = asyncio.get_running_loop().time
        kill_at = now() + EXIT_GRACE_S
        while not self._has_exited() and now() < kill_at + KILL_TIMEOUT_S:
            if now() >= kill_at:
                self._kill_group()
            await asyncio.sleep(POLL_S)
        self._kill_group()  # processes that the verifier started
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


def _popen(verifier: str, standard_input: socket.socket) -> subprocess.Popen[bytes]:
    """Start it without a fork of our own memory and threads. Raises RunError if the system can't start a process."""
    command = [sys.executable, "-u", "-m", "asyncdapo.reward.verifier_main", verifier, str(os.getpid())]
    try:
        return subprocess.Popen(
            command,
            stdin=standard_input.fileno(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise RunError(f"{sys.executable}: {error.strerror}") from error


def _describe_exit(code: int | None) -> str:
    if code is None:
        return f"not gone {KILL_TIMEOUT_S:g} s after SIGKILL"
    if code >= 0:
        return f"ended with exit code {code}"
    name = {number.value: number.name for number in signal.Signals}.get(-code, f"signal {-code}")
    return f"killed by {name}" + (" (by hand, or because memory ran out)" if name == "SIGKILL" else "")
