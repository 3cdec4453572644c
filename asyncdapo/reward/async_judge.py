"""Judges the texts of a request at the same time, with an async function.

In, out: as in `judge`. Up to `concurrency` texts run at once and start in order. Verdicts are reported in order, so the
pool's time-out still applies to each text: when the verdict before it is reported, the text has already started. A text
that blocks the event loop delays the verdicts of the others. The pool retries alone whichever text is late.

Owns: the event loop, one for the life of the process, so that the function can keep its connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from asyncdapo.reward.config import pauses_s
from asyncdapo.reward.judge import Tell, describe, read_verdict
from asyncdapo.reward.registry import AsyncVerify
from asyncdapo.reward.wire import Raised, Said, Verdict


class AsyncJudge:
    """An async verifier with its event loop."""

    def __init__(self, verify: AsyncVerify, concurrency: int, retries: int) -> None:
        self._verify, self._concurrency, self._pauses_s = verify, concurrency, pauses_s(retries)
        self._runner = asyncio.Runner()

    def __call__(self, texts: Sequence[str], answers: Sequence[str], tell: Tell) -> None:
        """Report a verdict for each text."""
        self._runner.run(self._judge(texts, answers, tell))

    async def _judge(self, texts: Sequence[str], answers: Sequence[str], tell: Tell) -> None:
        turn = asyncio.Semaphore(self._concurrency)
        wanted = zip(texts, answers, strict=True)
        tasks = [asyncio.create_task(self._judge_one(turn, text, answer)) for text, answer in wanted]
        for task in tasks:
            said = await task
            if not isinstance(said, Verdict):
                await _cancel(tasks)  # before the pool is told, so that none runs during the next request
            tell(said)
            if not isinstance(said, Verdict):
                break

    async def _judge_one(self, turn: asyncio.Semaphore, text: str, answer: str) -> Said:
        async with turn:
            for pause_s in (*self._pauses_s, None):
                try:
                    return read_verdict(await self._verify(text, answer))
                except asyncio.CancelledError as error:  # the function raised it, or the request is over
                    return Raised(describe(error))
                except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it raises fails only its group
                    raised = Raised(describe(error))
                if pause_s is not None:
                    await asyncio.sleep(pause_s)
            return raised


async def _cancel(tasks: Sequence[asyncio.Task[Said]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
