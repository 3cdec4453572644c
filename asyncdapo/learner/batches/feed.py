"""One rank's end of the wire to the replay server: asks for batch k until it arrives, and reads its tokens.

In: a step. Out: its `Batch` with the `Payload` of this rank's share, or `NoBatch` when the data is used up. Invariant:
the server answers a repeated `CutWanted` with the same batch, so a lost or damaged message costs one more question.
Does not own: when to ask (`batches`); where the tokens are (`tokens`); when a batch is cut, and what it waits for (the
server names it).

waits for: a full batch   unblocked by: rollout, replay
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from asyncdapo.errors import BatchError, RunError
from asyncdapo.learner.batches.tokens import Share, located_share, read_share
from asyncdapo.shares import Batch, CutWanted, NoBatch
from asyncdapo.transport.codec import Malformed
from asyncdapo.transport.keys import ClientKeys
from asyncdapo.transport.payload import Payload
from asyncdapo.transport.sockets import Client

ASK_AGAIN_S = 5.0
MAX_DAMAGED = 3
"""Damaged answers in a row after which the run ends."""


class BatchFeed:
    """One rank's connection to the replay server's learner address, and its view of the server's segments. Use it in
    one task at a time."""

    def __init__(
        self,
        address: str,
        run_dir: Path,
        rank: int = 0,
        *,
        ask_again_s: float = ASK_AGAIN_S,
        curve: ClientKeys | None = None,
    ) -> None:
        self._client: Client[Batch | NoBatch] = Client(
            address, Batch | NoBatch, identity=b"learner-" + os.urandom(8), curve=curve
        )
        self._run_dir, self._rank, self._ask_again_s = run_dir, rank, ask_again_s

    async def take(self, step: int) -> tuple[Batch, Payload] | NoBatch:
        """Wait, without a limit, until batch `step` is cut. Returns it with this rank's share, or the news that there
        is none. Raises RunError after `MAX_DAMAGED` answers that can't be decoded, BatchError when the batch can't be
        read back."""
        answer = await self._answer(step)
        if isinstance(answer, NoBatch):
            return answer
        batch, share = answer
        return batch, await asyncio.to_thread(read_share, self._run_dir, step, share)

    def close(self) -> None:
        self._client.close()

    async def _answer(self, step: int) -> tuple[Batch, Share] | NoBatch:
        damage: Exception | None = None
        for _ in range(MAX_DAMAGED):
            try:
                return await self._ask_until_answered(step)
            except (Malformed, ValueError) as error:
                damage = error
        raise RunError(f"batch {step} arrived damaged {MAX_DAMAGED} times in a row: {damage}") from damage

    async def _ask_until_answered(self, step: int) -> tuple[Batch, Share] | NoBatch:
        question = CutWanted(step=step, rank=self._rank)
        while True:
            await self._client.send(question)
            try:
                async with asyncio.timeout(self._ask_again_s):
                    return await self._receive(step)
            except TimeoutError:
                continue

    async def _receive(self, step: int) -> tuple[Batch, Share] | NoBatch:
        """The next answer about batch `step`. Late answers to earlier questions are ignored."""
        while True:
            answer, _ = await self._client.receive()
            if answer.step != step:
                continue
            if isinstance(answer, Batch):
                return answer, located_share(answer, self._rank)
            if answer.unreadable:
                raise BatchError(answer.reason)
            return answer
