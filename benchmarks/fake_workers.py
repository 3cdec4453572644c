"""Rollout workers that sample nothing: the same tokens answer every lease, after a time if that is asked for.

In: the server's address, and how much is asked of it. Out: groups that the server takes for those of real workers, and
how long each acknowledgement took. Does not own: processes, figures (`transport`).
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from dataclasses import dataclass

import numpy as np

from asyncdapo import messages as wire
from asyncdapo.transport.keys import ClientKeys
from asyncdapo.transport.payload import Payload, checksum
from asyncdapo.transport.sockets import Client

GROUP_SIZE, PROMPT_TOKENS, VOCAB = 16, 128, 150_000
PROMPT = list(range(PROMPT_TOKENS))
HEARTBEAT_S = 2.0


@dataclass(frozen=True)
class Load:
    """What is asked of the server."""

    num_tokens: int
    num_workers: int
    num_held: int
    rate: float


def prompt_at(prompt_id: int) -> wire.Prompt:
    return wire.Prompt(prompt_id=prompt_id, epoch=0, source="train", row=prompt_id, token_ids=PROMPT, answer="42")


def completions_of(num_tokens: int) -> tuple[list[wire.Completion], tuple[memoryview, ...]]:
    """Those of every group, and the frames of their tokens: half of the answers are right."""
    draw = np.random.default_rng(0)
    token_ids = draw.integers(0, VOCAB, (GROUP_SIZE, num_tokens), np.int32)
    completions = []
    for index, own in enumerate(token_ids):
        crc = checksum(np.concatenate([np.array(PROMPT, np.int32), own]), 0)
        score = 2.0 * (index % 2) - 1
        completions.append(
            wire.Completion(
                contexts=[wire.Context.of_turn([(0, num_tokens)], [(1, num_tokens)], crc)],
                finish_reason="stop",
                reward=score,
                metrics={"acc": float(index % 2), "score": score, "seq_reward": score, "seq_final_reward": score},
            )
        )
    logprobs = -draw.random(GROUP_SIZE * num_tokens, np.float32)
    return completions, Payload(np.array(PROMPT, np.int32), token_ids.ravel(), logprobs).frames()


def group_of(lease: wire.Lease, worker: int, completions: list[wire.Completion]) -> wire.Group:
    return wire.Group(
        prompt_id=lease.prompt.prompt_id,
        lease_id=lease.lease_id,
        branch=lease.branch,
        attempt=lease.attempt,
        worker=worker,
        num_prompt_tokens=PROMPT_TOKENS,
        completions=completions,
        generate_s=1.0,
    )


class FakeWorker:
    """A rollout worker's end of the wire: every lease is answered with the same tokens."""

    def __init__(
        self,
        index: int,
        address: str,
        keys: ClientKeys,
        load: Load,
        completions: list[wire.Completion],
        frames: tuple[memoryview, ...],
        acks: array,
    ) -> None:
        self._index, self._load, self._completions, self._frames, self._acks = index, load, completions, frames, acks
        self._client: Client = Client(
            address, wire.Welcome | wire.Lease | wire.Ack | wire.Reject | wire.Withdraw, b"w%d" % index, curve=keys
        )
        self.served = asyncio.Event()
        """It has had an acknowledgement."""
        self._asked, self._sampling, self._sent_at = 0, dict[int, asyncio.Task](), dict[int, float]()

    async def listen(self) -> None:
        hello = wire.Hello(
            schema=wire.SCHEMA_VERSION, worker=self._index, session="s", loaded_version=0, branch=0, granted=0
        )
        await self._client.send(hello)
        while True:
            message, _ = await self._client.receive()
            match message:
                case wire.Welcome():
                    await self._ask(self._load.num_held)
                case wire.Lease(lease_id=lease_id) if lease_id in self._sampling or lease_id in self._sent_at:
                    continue  # it was under way when a heartbeat left
                case wire.Lease():
                    self._sampling[message.lease_id] = asyncio.create_task(self._sample(message))
                case wire.Ack(lease_id=lease_id) if lease_id in self._sent_at:
                    now = time.monotonic()
                    self._acks.extend((now, now - self._sent_at.pop(lease_id)))
                    self.served.set()
                    await self._ask(1)
                case wire.Withdraw() | wire.Ack():
                    continue  # a heartbeat and an acknowledgement crossed
                case wire.Reject():
                    raise RuntimeError(f"the server says {message}")

    async def beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            held = [*self._sampling, *self._sent_at]
            heartbeat = wire.Heartbeat(
                asked=self._asked,
                loaded_version=0,
                branch=0,
                progress={
                    lease_id: wire.Progress(num_tokens=1, phase="sampled", started_version=0) for lease_id in held
                },
                evaluations=[],
                gauges={"tokens": 1.0},
            )
            await self._client.send(heartbeat)

    def close(self) -> None:
        self._client.close()

    async def _ask(self, more: int) -> None:
        self._asked += more
        await self._client.send(wire.Ask(asked=self._asked))

    async def _sample(self, lease: wire.Lease) -> None:
        if self._load.rate:
            mean_s = self._load.num_workers * self._load.num_held / self._load.rate
            await asyncio.sleep(mean_s * random.uniform(0.5, 1.5))
        self._sent_at[lease.lease_id] = time.monotonic()
        del self._sampling[lease.lease_id]
        await self._client.send(wire.GroupDone(group=group_of(lease, self._index, self._completions)), self._frames)
