"""Verifiers in processes of their own, which can be killed: texts in, verdicts out, whatever the user's function does.

    verify(texts, answer) ──waits for a free process──▶ one request for all texts ──▶ a verdict for each

Texts that are to be judged by themselves share a request with those that become ready while they wait for a process: an
error of one of them is its own.

    takes over `timeout_s` over one text    process killed; the text is retried once, alone, in a fresh process;
      (pauses between retries don't count)  then 0, `timed_out`
    dies (signal, exit, out of memory)      process replaced; the text is retried once, alone; then RewardError
    raises                                  RewardError; the process lives on
    returns something else                  VerdictError
    can't be started                        a few tries in a row (`child/place`); then RunError, which ends the worker
    all its callers are cancelled           the process is killed, so that no answer reaches the next request

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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from asyncdapo.accounting.clock import Level
from asyncdapo.child.place import Place
from asyncdapo.errors import RewardError, RunError, VerdictError
from asyncdapo.reward.config import pauses_s
from asyncdapo.reward.verifier_process import KIND, VerifierProcess
from asyncdapo.reward.wire import NoVerdict, Raised, Request, Setup, Verdict

MAX_TRIES = 2
"""Processes that may fail on one text."""

log = logging.getLogger("reward")


Outcome = Verdict | RewardError | VerdictError


@dataclass(eq=False)
class _Single:
    """A text that is to be judged by itself."""

    text: str
    answer: str
    verdict: asyncio.Future[Verdict]


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
        self._singles: list[_Single] = []
        """Those that no process has got."""
        self._sharing: set[asyncio.Task[None]] = set()
        """Requests of such texts."""
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
        if len(texts) == 1:
            return [await self._verify_single(texts[0], answer)]
        verdicts: list[Verdict] = []
        async with self._free_place() as place:
            for outcome in await self._judge(place, texts, [answer] * len(texts)):
                if not isinstance(outcome, Verdict):
                    raise outcome
                verdicts.append(outcome)
        return verdicts

    @asynccontextmanager
    async def _free_place(self) -> AsyncIterator[Place[VerifierProcess]]:
        """A place that nobody else has in the body."""
        with self._queued.raised():
            place = await self._free.get()
        try:
            with self._busy.raised():
                yield place
        finally:
            self._free.put_nowait(place)

    async def _verify_single(self, text: str, answer: str) -> Verdict:
        single = _Single(text, answer, asyncio.get_running_loop().create_future())
        self._singles.append(single)
        if len(self._singles) == 1:
            self._share_a_request()
        return await single.verdict

    def _share_a_request(self) -> None:
        task = asyncio.create_task(self._judge_singles())
        self._sharing.add(task)
        task.add_done_callback(self._sharing.discard)

    async def _judge_singles(self) -> None:
        """Judge the share of one process of all that are ready when it is free."""
        async with self._free_place() as place:
            ready = [single for single in self._singles if not single.verdict.done()]
            num = -(-len(ready) // len(self._places))
            left, self._singles = ready[:num], ready[num:]
            if self._singles:
                self._share_a_request()
            judging = asyncio.ensure_future(self._judge_each(place, left))

            def note_end(_: asyncio.Future[Verdict]) -> None:
                if all(single.verdict.cancelled() for single in left):
                    judging.cancel()

            for single in left:
                single.verdict.add_done_callback(note_end)
            await asyncio.wait([judging])
            if not judging.cancelled() and (error := judging.exception()):
                for single in left:
                    if not single.verdict.done():
                        single.verdict.set_exception(error)

    async def _judge_each(self, place: Place[VerifierProcess], left: list[_Single]) -> None:
        """Judge them all, also those behind one that fails."""
        while left:
            outcomes = await self._judge(place, [one.text for one in left], [one.answer for one in left])
            for single, outcome in zip(left, outcomes, strict=False):
                if single.verdict.done():
                    continue
                if isinstance(outcome, Verdict):
                    single.verdict.set_result(outcome)
                else:
                    single.verdict.set_exception(outcome)
            left = left[len(outcomes) :]

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

    async def _judge(self, place: Place[VerifierProcess], texts: list[str], answers: list[str]) -> list[Outcome]:
        """An outcome for each text, up to the first error."""
        outcomes: list[Outcome] = []
        texts, answers = [_encodable(text) for text in texts], [_encodable(answer) for answer in answers]
        num_tries = 0
        """Tries of the text on which the last process failed."""
        while len(outcomes) < len(texts):
            first = len(outcomes)
            end = first + 1 if num_tries else len(texts)  # retry it alone: no other text can be the cause
            process = await place.process()
            said = await process.ask(Request(texts[first:end], answers[first:end]), end - first, self._timeout_s)
            outcomes += [verdict for verdict in said if isinstance(verdict, Verdict)]
            match said[-1:]:
                case [Raised(problem=problem)]:
                    return [*outcomes, RewardError(problem)]
                case [NoVerdict(problem=problem)]:
                    return [*outcomes, VerdictError(problem)]
            if len(outcomes) == end:
                num_tries = 0
                continue
            num_tries = 1 if said else num_tries + 1
            if num_tries == MAX_TRIES:
                outcomes.append(await self._give_up(process))
                num_tries = 0
                if isinstance(outcomes[-1], RewardError):
                    return outcomes
        return outcomes

    async def _give_up(self, process: VerifierProcess) -> Verdict | RewardError:
        """The outcome of a text on which `MAX_TRIES` processes failed; `process` is the last of them."""
        if not process.timed_out:
            return RewardError(f"its process ended {MAX_TRIES} times, the last one {await process.end()}")
        self._counts["scorer_timeouts"] += 1
        log.warning("a completion counts 0: the verifier took over %g s, %d times", self._timeout_s, MAX_TRIES)
        return Verdict(0.0, timed_out=True)


def _encodable(text: str) -> str:
    """The text as it can be sent: a lone surrogate becomes a question mark."""
    return text if text.isascii() else text.encode(errors="replace").decode()
