"""One rank's batches: asked for at the replay server until they come, and their tokens read from its segments.

    ──CutWanted──▶ replay ──Batch: headers, deal, places──▶ a record of each group of which the rank has a piece, from
                                                            RUN_DIR/payloads/000007.bin ──▶ a Payload of each piece

In: a step. Out: its `Batch` with this rank's share, or `NoBatch` when the data is used up; then the `Payload` of each
piece of the share. Or BatchError: the run goes back to its checkpoint, and the rollback finds what is damaged and
samples those prompts again. Invariants: the server answers a repeated `CutWanted` with the same batch, so a lost or
damaged message costs one more question. The tokens are those that were written: each record's checksums hold, and its
group is that of the header in the batch. Does not own: when to ask (`batches`); the format of a record
(`records/record`); when a batch is cut, and what it waits for (the server names it).

waits for: a full batch   unblocked by: rollout, replay
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from asyncdapo.errors import BatchError, ConfigError, RunError
from asyncdapo.records.record import PAYLOAD_FOLDER, BadRecord, Place, read_records
from asyncdapo.shares import Batch, CutWanted, NoBatch, Piece, share_of
from asyncdapo.transport.codec import BATCH_LIMITS, Malformed
from asyncdapo.transport.keys import ClientKeys
from asyncdapo.transport.payload import Payload
from asyncdapo.transport.sockets import Client

ASK_AGAIN_S = 5.0
MAX_DAMAGED = 3
"""Damaged answers in a row after which the run ends."""
Share = Sequence[tuple[Piece, Place]]
"""What a rank trains on, and where the record of each piece's group is."""


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
            address, Batch | NoBatch, b"learner-" + os.urandom(8), BATCH_LIMITS, curve=curve
        )
        self._run_dir, self._rank, self._ask_again_s = run_dir, rank, ask_again_s

    async def take(self, step: int) -> tuple[Batch, Share] | NoBatch:
        """Wait, without a limit, until batch `step` is cut. Returns it with this rank's share, or the news that there
        is none. Raises RunError after `MAX_DAMAGED` answers that can't be decoded, BatchError when the server can't
        read its headers back."""
        damage: Exception | None = None
        for _ in range(MAX_DAMAGED):
            try:
                return await self._ask_until_answered(step)
            except (Malformed, ValueError) as error:
                damage = error
        raise RunError(f"batch {step} arrived damaged {MAX_DAMAGED} times in a row: {damage}") from damage

    async def read(self, step: int, share: Share) -> list[Payload]:
        """The tokens of each piece of this rank's share of batch `step`. The storage may take its time:
        the event loop goes on. Raises BatchError."""
        return await asyncio.to_thread(read_share, self._run_dir, step, share)

    def close(self) -> None:
        self._client.close()

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


def check_folder(run_dir: Path, who: str) -> None:
    """The replay server has made the folder before any rank starts. Raises ConfigError where it isn't seen."""
    folder = run_dir / PAYLOAD_FOLDER
    if not folder.is_dir():
        problem = f"has to be on storage that all nodes share: {who} reads its tokens from {folder}, which isn't there"
        fix = "choose a directory that every node sees under the same path"
        raise ConfigError("run.dir", problem, str(run_dir), fix)


def located_share(batch: Batch, rank: int) -> Share:
    """Raises ValueError for a batch whose parts are not of the same groups."""
    if len(batch.places) != len(batch.groups):
        raise ValueError(f"{len(batch.places)} places for {len(batch.groups)} groups")
    return [(piece, batch.places[piece.place]) for piece in share_of(batch, rank)]


def read_share(run_dir: Path, step: int, share: Share) -> list[Payload]:
    """The payload of each piece of a share of batch `step`. Blocks for as long as the storage takes. Raises
    BatchError."""
    try:
        records = read_records(run_dir / PAYLOAD_FOLDER, {piece.header.lease_id: place for piece, place in share})
    except BadRecord as bad:
        raise BatchError(f"batch {step} can't be read back from {run_dir}: {bad}") from bad
    parts = [(piece, *records[piece.header.lease_id]) for piece, _ in share]
    return [payload.of_completions(group, piece.indices) for piece, group, payload in parts]
