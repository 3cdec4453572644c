"""A verifier process as its pool sees it: started, asked, and ended by whatever came first.

In: texts to judge. Out: what the process says of them, and how it ended. One request at a time. A process that takes
too long over one text, or whose request is given up, is killed: so an answer is never taken for that of another
request. `process` is its main.

Owns: the operating system's process, its socket, its output (to the log, a line at a time). Does not own: what becomes
of a text that was not judged (the pool's). Linux ends a child when the *thread* that started it ends: here the event
loop's.
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
from typing import Self

from asyncdapo.errors import RunError
from asyncdapo.reward.wire import FromProcess, NoVerdict, Raised, Ready, Request, Setup, Unpacker, Verdict, pack

START_TIMEOUT_S = 60.0
"""For the import of the user's modules."""
EXIT_GRACE_S = 1.0
"""For a process that ends by itself; then it is killed."""
KILL_TIMEOUT_S = 10.0
POLL_S = 0.002
OUTPUT_GRACE_S = 0.2
NUM_LAST_LINES = 5
MAX_LINE_BYTES = 4096

log = logging.getLogger("reward")


class Output(asyncio.Protocol):
    """Standard output and error of a process: lines to the log, the last ones kept."""

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
        """Read no further, whoever still holds the other end."""
        if self._transport is not None:
            self._transport.close()

    def _take(self, line: bytes) -> None:
        text = line[:MAX_LINE_BYTES].decode(errors="replace").rstrip()
        if text:
            self.last_lines.append(text)
            log.info("verifier process %d: %s", self._pid, text)


class VerifierProcess(asyncio.Protocol):
    """One process from its start to its end. Made by `start`."""

    def __init__(self, popen: subprocess.Popen[bytes], on_verdict: Callable[[], None]) -> None:
        self.pid = popen.pid
        self.alive = True
        """Whether it can be asked."""
        self.timed_out = False
        """Killed because it took too long."""
        self.given_up = False
        """Killed because nobody wanted its answer any more."""
        self._popen = popen
        self._on_verdict = on_verdict
        self._output = Output(popen.pid)
        self._unpacker = Unpacker(FromProcess)
        self._transport: asyncio.Transport | None = None
        self._said: list[FromProcess] = []
        self._over: asyncio.Future[None] | None = None
        self._exit: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(cls, verifier: str, setup: Setup, on_verdict: Callable[[], None]) -> Self:
        """A process that has loaded the verifier. Raises RunError, with its last lines, for one that can't.

        `on_verdict` is called at every verdict, as it comes in.
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
        if said:
            raise RunError(said[0].problem)
        if process.timed_out:
            how = f"no answer in {START_TIMEOUT_S:g} s"
        raise RunError(": ".join([how, *process.last_lines]))

    @property
    def last_lines(self) -> list[str]:
        """Of its output."""
        return list(self._output.last_lines)

    async def ask(self, message: Setup | Request, num_wanted: int, timeout_s: float) -> list[FromProcess]:
        """What the process says, in order: fewer than `num_wanted` if it raised or ended before. It is killed when it
        takes longer than `timeout_s` from one answer to the next, and when the caller is cancelled."""
        if not self.alive:
            return []
        loop = asyncio.get_running_loop()
        self._said, self._num_wanted, self._over = [], num_wanted, loop.create_future()
        self._heard_at, self._timeout_s = loop.time(), timeout_s
        self._timer = loop.call_later(timeout_s, self._check_time)
        self._transport.write(pack(message))
        try:
            await self._over
            return self._said
        except asyncio.CancelledError:
            self.given_up = True
            self.kill()
            raise
        finally:
            self._timer.cancel()
            self._over = None

    def kill(self) -> None:
        """End it at once, with all that it started; returns before it is gone."""
        self._kill_group()
        self._note_end()

    async def end(self) -> str:
        """End it, in good order if it lets us, and wait until it is gone. Returns how it ended."""
        self._note_end()
        return await asyncio.shield(self._exit)

    # ----------------------------------------------------------------------------------------- called by the event loop

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Handled here and not in a task, so that a loop that was held up sees answers before it sees time-outs."""
        for said in self._unpacker.feed(data):
            if self._over is None or self._over.done():
                continue
            self._said.append(said)
            self._heard_at = asyncio.get_running_loop().time()
            if isinstance(said, Verdict):
                self._on_verdict()
            if len(self._said) == self._num_wanted or isinstance(said, Raised | NoVerdict):
                self._over.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._note_end()

    # -------------------------------------------------------------------------------------------------------- its end

    def _check_time(self) -> None:
        loop = asyncio.get_running_loop()
        left_s = self._heard_at + self._timeout_s - loop.time()
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._check_time)
        else:
            self.timed_out = True
            self.kill()

    def _note_end(self) -> None:
        """However it ends, it ends here, once: nobody waits for an answer any more, and the rest is cleared away."""
        if not self.alive:
            return
        self.alive = False
        if self._transport is not None:
            self._transport.close()
        if self._over is not None and not self._over.done():
            self._over.set_result(None)
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        now = asyncio.get_running_loop().time
        kill_at = now() + EXIT_GRACE_S
        while not self._has_exited() and now() < kill_at + KILL_TIMEOUT_S:
            if now() >= kill_at:
                self._kill_group()
            await asyncio.sleep(POLL_S)
        self._kill_group()  # what the verifier had started itself
        with suppress(TimeoutError):
            async with asyncio.timeout(OUTPUT_GRACE_S):
                await self._output.ended.wait()
        self._output.close()
        self._exit.set_result(_describe_exit(self._popen.poll()))

    def _has_exited(self) -> bool:
        """Without taking note of it: until then nobody else can get its pid, so the group can be killed by number."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # somebody in this process waits for every child
            return True

    def _kill_group(self) -> None:
        if self._popen.returncode is None:
            with suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies can't be killed
                os.killpg(self.pid, signal.SIGKILL)


def _popen(verifier: str, standard_input: socket.socket) -> subprocess.Popen[bytes]:
    """Started without a fork of our own memory and threads. Raises RunError where there is no room for a process."""
    command = [sys.executable, "-u", "-m", "asyncdapo.reward.process", verifier, str(os.getpid())]
    try:
        return subprocess.Popen(
            command, stdin=standard_input, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        raise RunError(f"{sys.executable}: {error.strerror}") from error


def _describe_exit(code: int | None) -> str:
    if code is None:
        return f"not gone {KILL_TIMEOUT_S:g} s after SIGKILL"
    if code >= 0:
        return f"ended with exit code {code}"
    name = {number.value: number.name for number in signal.Signals}.get(-code, f"signal {-code}")
    return f"killed by {name}" + (" (by hand, or for lack of memory)" if name == "SIGKILL" else "")
