"""Texts of a request judged at the same time by an async function.

In, out: as in `judging`. Up to `concurrency` texts are under way, and they begin in order. So the text that the pool
waits for has begun by the time the one before it is told, and no time from one verdict to the next is longer than the
text's own: the pool's time-out holds for each of them, as it does one after the other. (One that doesn't let the others
run holds up their verdicts; the pool has whichever it waits for judged again, alone.)

Owns: the event loop, one for the life of the process, so that the function may keep its connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from asyncdapo.reward.config import pauses_s
from asyncdapo.reward.judging import Tell, describe, read_verdict
from asyncdapo.reward.registry import Verify
from asyncdapo.reward.wire import Raised, Said, Verdict


class AsyncJudge:
    """An async function with its event loop."""

    def __init__(self, verify: Verify, concurrency: int, retries: int) -> None:
        self._verify, self._concurrency, self._pauses_s = verify, concurrency, pauses_s(retries)
        self._runner = asyncio.Runner()

    def __call__(self, texts: Sequence[str], answer: str, tell: Tell) -> None:
        """Tell a verdict for each text."""
        self._runner.run(self._judge(texts, answer, tell))

    async def _judge(self, texts: Sequence[str], answer: str, tell: Tell) -> None:
        turn = asyncio.Semaphore(self._concurrency)
        tasks = [asyncio.create_task(self._judge_one(turn, text, answer)) for text in texts]
        for task in tasks:
            said = await task
            if not isinstance(said, Verdict):
                await _cancel(tasks)  # before the pool hears of it: the next request has the loop to itself
            tell(said)
            if not isinstance(said, Verdict):
                break

    async def _judge_one(self, turn: asyncio.Semaphore, text: str, answer: str) -> Said:
        async with turn:
            for pause_s in (*self._pauses_s, None):
                try:
                    return read_verdict(await self._verify(text, answer))
                except asyncio.CancelledError as error:  # by the function itself, or the request is over
                    return Raised(describe(error))
                except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it raises ends its group only
                    raised = Raised(describe(error))
                if pause_s is not None:
                    await asyncio.sleep(pause_s)
            return raised


async def _cancel(tasks: Sequence[asyncio.Task[Said]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
