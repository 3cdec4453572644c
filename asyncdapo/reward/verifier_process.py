"""A verifier process as its pool sees it: start it, ask it.

In: texts to judge. Out: the process's verdicts. One request at a time. A process that takes too long over one text is
killed, and so is one whose request is cancelled: an answer can't be taken for that of another request. Its main is
`verifier_main`. Does not own: the operating system's process (`child/process`), texts that were not judged (the pool).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from asyncdapo.child.process import START_TIMEOUT_S, ChildProcess, Launched
from asyncdapo.errors import RunError
from asyncdapo.reward.wire import Broken, FromProcess, NoVerdict, Raised, Ready, Request, Setup, Unpacker, Verdict, pack

KIND = "verifier process"

log = logging.getLogger("reward")


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


class VerifierProcess(ChildProcess):
    """One process from its start to its end. Create it with `start`."""

    def __init__(self, launched: Launched, on_verdict: Callable[[], None]) -> None:
        super().__init__(launched, KIND, log)
        self.timed_out = False
        """Killed because it took too long."""
        self._on_verdict = on_verdict
        self._unpacker = Unpacker(FromProcess)
        self._pending: _Pending | None = None

    @classmethod
    async def start(cls, verifier: str, setup: Setup, on_verdict: Callable[[], None]) -> VerifierProcess:
        """A process that has loaded the verifier. Raises RunError, with its last lines of output, if it can't.

        `on_verdict` is called at each verdict, as soon as it arrives.
        """
        command = [sys.executable, "-u", "-m", "asyncdapo.reward.verifier_main", verifier, str(os.getpid())]
        process = await cls.connected(lambda launched: cls(launched, on_verdict), command)
        try:
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
        self.send(pack(message))
        try:
            await pending.over
            return pending.said
        except asyncio.CancelledError:
            self.kill()
            raise
        finally:
            pending.timer.cancel()
            self._pending = None

    # ----------------------------------------------------------------------------------------- called by the event loop

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

    def release(self) -> None:
        if self._pending is not None and not self._pending.over.done():
            self._pending.over.set_result(None)

    def _check_time(self) -> None:
        loop, pending = asyncio.get_running_loop(), self._pending
        assert pending is not None, "a timer without a request"
        left_s = pending.heard_at + pending.timeout_s - loop.time()
        if left_s > 0:
            pending.timer = loop.call_later(left_s, self._check_time)
        else:
            self.timed_out = True
            self.kill("took too long over a completion")
