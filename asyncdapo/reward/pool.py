"""Verifiers in processes of their own, which can be killed: texts in, verdicts out, whatever the user's function does.

    verify(texts, answer) ──waits for a free process──▶ one request for all texts ──▶ a verdict for each

    takes over `timeout_s` over one text    process killed; the text is retried once, alone, in a fresh process;
      (pauses between retries don't count)  then 0, `timed_out`
    dies (signal, exit, out of memory)      process replaced; the text is retried once, alone; then RewardError
    raises                                  RewardError; the process lives on
    returns something else                  VerdictError
    can't be started                        a few tries in a row (`child/place`); then RunError, which ends the worker
    the caller is cancelled                 its process is killed, so that no answer reaches the next request

Invariant: a process has one request at a time, so the callers bound the queue. Verdicts are in the order of the texts.
Start, use and stop it in one event loop, which has to live as long as the pool: see `child/process`. Does not own:
tokens, scale, metrics (the scorer).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import Counter

from asyncdapo.accounting.clock import Level
from asyncdapo.child.place import Place
from asyncdapo.errors import RewardError, RunError, VerdictError
from asyncdapo.reward.config import pauses_s
from asyncdapo.reward.verifier_process import KIND, VerifierProcess
from asyncdapo.reward.wire import NoVerdict, Raised, Request, Setup, Verdict

MAX_TRIES = 2
"""Processes that may fail on one text."""

log = logging.getLogger("reward")


class ScorerPool:
    """A fixed number of verifier processes. One that ends is replaced."""

    def __init__(
        self, verifier: str, num_processes: int, timeout_s: float, *, concurrency: int = 1, retries: int = 0
    ) -> None:
        """`timeout_s`: for all tries of one text together, without the pauses between them."""
        self._timeout_s = timeout_s + sum(pauses_s(retries))
        self._verifier, self._concurrency, self._retries = verifier, concurrency, retries
        self._counts: Counter[str] = Counter()
        self._places = [self._place() for _ in range(num_processes)]
        self._free: asyncio.Queue[Place[VerifierProcess]] = asyncio.Queue()
        self._began_s = time.monotonic()
        self._busy, self._queued = Level(), Level()
        """Processes that work on a request, and requests that wait for one."""

    async def start(self) -> None:
        """Start every process. If one can't start, ends all of them and raises RunError."""
        ready = await asyncio.gather(*(place.process() for place in self._places), return_exceptions=True)
        for error in ready:
            if isinstance(error, BaseException):
                await self.stop()
                raise error
        for place in self._places:
            self._free.put_nowait(place)

    async def stop(self) -> None:
        """End every process; returns when they are gone. Running requests raise RunError."""
        await asyncio.gather(*(place.close() for place in self._places))

    def pids(self) -> list[int]:
        """Pids of the live processes."""
        return [place.current.pid for place in self._places if place.current and place.current.alive]

    def gauges(self) -> dict[str, float]:
        """Cumulative: `scorer_timeouts`, completions that count 0 because the verifier took too long;
        `scorer_restarts`, processes replaced because they took too long or died."""
        restarts = sum(place.num_restarts for place in self._places)
        return {"scorer_timeouts": self._counts["scorer_timeouts"], "scorer_restarts": restarts}

    def account(self) -> dict[str, float]:
        """Cumulative seconds: of processes with a request (`verifier_busy_s`) and without (`verifier_idle_s`), of
        requests without a process (`verifier_queue_s`)."""
        busy_s, wall_s = self._busy.total(), time.monotonic() - self._began_s
        return {
            "verifier_busy_s": busy_s,
            "verifier_idle_s": len(self._places) * wall_s - busy_s,
            "verifier_queue_s": self._queued.total(),
        }

    @property
    def num_verdicts(self) -> int:
        """Texts judged so far, over all requests. It rises while the pool makes progress."""
        return self._counts["verdicts"] + self._counts["scorer_timeouts"]

    async def verify(self, texts: list[str], answer: str) -> list[Verdict]:
        """A verdict for each text. Raises RewardError if the verifier fails, VerdictError if it returns something that
        isn't a verdict, RunError if it can't be started."""
        with self._queued.raised():
            place = await self._free.get()
        try:
            with self._busy.raised():
                return await self._verify(place, texts, answer)
        finally:
            self._free.put_nowait(place)

    def _place(self) -> Place[VerifierProcess]:
        async def start() -> VerifierProcess:
            setup = Setup([os.path.abspath(path) for path in sys.path], self._concurrency, self._retries)
            try:
                return await VerifierProcess.start(self._verifier, setup, note_verdict)
            except RunError as error:
                raise RunError(f"verifier {self._verifier!r}: {error}") from error

        def note_verdict() -> None:
            place.note_work()
            self._counts["verdicts"] += 1

        place = Place(KIND, start, log)
        return place

    async def _verify(self, place: Place[VerifierProcess], texts: list[str], answer: str) -> list[Verdict]:
        verdicts: list[Verdict] = []
        texts, answer = [_encodable(text) for text in texts], _encodable(answer)
        num_tries = 0
        """Tries of the text on which the last process failed."""
        while left := texts[len(verdicts) :]:
            asked = left[:1] if num_tries else left  # retry it alone: no other text can be the cause
            process = await place.process()
            said = await process.ask(Request(asked, answer), len(asked), self._timeout_s)
            match said[-1:]:
                case [Raised(problem=problem)]:
                    raise RewardError(problem)
                case [NoVerdict(problem=problem)]:
                    raise VerdictError(problem)
            verdicts += [verdict for verdict in said if isinstance(verdict, Verdict)]
            if len(said) == len(asked):
                num_tries = 0
                continue
            num_tries = 1 if said else num_tries + 1
            if num_tries == MAX_TRIES:
                verdicts.append(await self._give_up(process))
                num_tries = 0
        return verdicts

    async def _give_up(self, process: VerifierProcess) -> Verdict:
        """The verdict on a text on which `MAX_TRIES` processes failed; `process` is the last of them."""
        if not process.timed_out:
            raise RewardError(f"its process ended {MAX_TRIES} times, the last one {await process.end()}")
        self._counts["scorer_timeouts"] += 1
        log.warning("a completion counts 0: the verifier took over %g s, %d times", self._timeout_s, MAX_TRIES)
        return Verdict(0.0, timed_out=True)


def _encodable(text: str) -> str:
    """The text as it can be sent: a lone surrogate becomes a question mark."""
    return text if text.isascii() else text.encode(errors="replace").decode()
