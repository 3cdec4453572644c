"""A small engine, a scorer, and the other end of the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import UnionType
from typing import TypeVar

import msgspec
import numpy as np
import zmq

from asyncdapo.eval_messages import EvalDone, EvalRequest, Sampling
from asyncdapo.messages import (
    Ask,
    FinishReason,
    GroupDone,
    GroupFailed,
    Heartbeat,
    Hello,
    Lease,
    Loaded,
    Message,
    Prompt,
    Score,
    Started,
    Welcome,
)
from asyncdapo.rollout.config import RolloutConfig
from asyncdapo.rollout.engine import LoadTimes, Request, Sample
from asyncdapo.rollout.episodes import SingleTurn
from asyncdapo.rollout.worker import RolloutWorker
from asyncdapo.transport.payload import PartialGroup
from asyncdapo.transport.sockets import Server

M = TypeVar("M", bound=Message)

HEARTBEAT_S = 0.04
NEVER_S = 1000.0
"""A heartbeat that doesn't come again during a test: what arrives was sent for its own sake."""
GROUP_SIZE = 4


class FakeEngine:
    """Samples one token of every request per step; sample `i` of a request ends after `num_tokens(i)` tokens. The
    tokens are the low digits of the seed. Steps happen while `gate` is set; `error` is raised at the next one."""

    def __init__(self, num_slots: int = 8, num_tokens: Callable[[int], int] = lambda _: 3) -> None:
        self.num_slots = num_slots
        self.stops_to_load = False
        self.num_outstanding = 0
        self.loaded_version = 0
        self.requests: list[Request] = []
        self.num_requests_at_once = 0
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self._num_tokens = num_tokens
        self._num_running = 0

    async def start(self) -> None:
        self.loaded_version = 0

    async def stop(self) -> None:
        self.gate.clear()

    def gauges(self) -> dict[str, float]:
        return {"tokens": sum(request.num_sampled for request in self.requests)}

    async def load_weights(self, version: int, weights: dict) -> LoadTimes:
        self.loaded_version = version
        return LoadTimes(load_s=0.0)

    async def generate(self, request: Request) -> list[Sample]:
        lengths = [self._num_tokens(sample) for sample in range(len(request.seeds))]
        self.requests.append(request)
        self.num_outstanding += len(lengths)
        num_unfinished = len(lengths)
        self._num_running += 1
        request.num_running = len(lengths)
        self.num_requests_at_once = max(self.num_requests_at_once, self._num_running)
        try:
            for step in range(1, max(lengths) + 1):
                await self._step()
                if step == 1 and request.on_started:
                    request.on_started(self.loaded_version)
                request.num_sampled += sum(length >= step for length in lengths)
                num_done = lengths.count(step)
                num_unfinished -= num_done
                request.num_running = num_unfinished
                self.num_outstanding -= num_done
                if num_done and request.on_sample_done:
                    request.on_sample_done()
        finally:
            self.num_outstanding -= num_unfinished
            self._num_running -= 1
        return [self._sample(seed, length) for seed, length in zip(request.seeds, lengths, strict=True)]

    async def _step(self) -> None:
        await self.gate.wait()
        await asyncio.sleep(0)
        if self.error:
            raise self.error

    def _sample(self, seed: int, length: int) -> Sample:
        return Sample(
            token_ids=tokens_of(seed, length),
            logprobs=np.full(length, -0.5, np.float32),
            versions=[(self.loaded_version, length)],
            finish_reason="stop",
        )


def tokens_of(seed: int, length: int) -> np.ndarray:
    return np.array([seed % 1000 + at for at in range(length)], np.int32)


async def score_first_token(
    prompt: Prompt, token_ids: Sequence[np.ndarray], finish_reasons: Sequence[FinishReason], seed: int
) -> list[Score]:
    """The first token is the prediction, its parity the verdict."""
    firsts = [int(ids[0]) for ids in token_ids]
    return [Score(reward=2 * (one % 2) - 1.0, metrics={"acc": float(one % 2)}, pred=str(one)) for one in firsts]


def say_tokens(token_ids: np.ndarray) -> str:
    """The text of a response."""
    return " ".join(map(str, token_ids))


class FakeReplay:
    """The replay server's end of the socket, driven by the test. Keeps everything that it received, and answers `Hello`
    unless told otherwise."""

    def __init__(self, port: int = 0) -> None:
        self._server = Server(
            Hello | Ask | Started | Loaded | GroupDone | GroupFailed | PartialGroup | Heartbeat | EvalDone, port=port
        )
        self.address = self._server.address
        self.peer = b""
        self.welcoming = True
        self.branch = self.num_granted = 0
        self.received: list[Message] = []

    @staticmethod
    async def restarted(port: int) -> FakeReplay:
        """A new server where one was closed; ZeroMQ frees a port a moment after the close."""
        while True:
            try:
                return FakeReplay(port)
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE:
                    raise
                await asyncio.sleep(0.01)

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])

    async def expect(self, kind: type[M] | UnionType, when: Callable[[M], bool] = lambda _: True) -> M:
        """The next message of this kind; those before it are skipped."""
        while True:
            self.peer, message, self.frames = await self._server.receive()
            self.received.append(message)
            if isinstance(message, Hello) and self.welcoming:
                await self.send(Welcome(branch=self.branch, granted=max(self.num_granted, message.granted)))
            if isinstance(message, kind) and when(message):
                return message

    async def listen(self, heartbeats: float) -> list[Message]:
        """All messages of so many heartbeats' time."""
        num_before = len(self.received)
        try:
            async with asyncio.timeout(heartbeats * HEARTBEAT_S):
                await self.expect(Message, lambda _: False)
        except TimeoutError:
            return self.received[num_before:]

    async def grant(self, *work: Lease | EvalRequest) -> None:
        for message in work:
            self.num_granted += 1
            await self.send(msgspec.structs.replace(message, number=self.num_granted))

    async def send(self, message: Message) -> None:
        await self._server.send(self.peer, message)

    def close(self) -> None:
        self._server.close()


def make_prompt(prompt_id: int) -> Prompt:
    return Prompt(prompt_id=prompt_id, epoch=0, source="sums", row=prompt_id, token_ids=[1, 2, prompt_id], answer="3")


def make_lease(lease_id: int, group_size: int = GROUP_SIZE) -> Lease:
    """A lease for the prompt 100 above it."""
    return Lease(
        lease_id=lease_id,
        branch=0,
        attempt=0,
        group_size=group_size,
        seed=lease_id,
        prompt=make_prompt(100 + lease_id),
    )


def make_evaluation(num_prompts: int = 2, samples: Sequence[int] = (0,), temperature: float = 0.0) -> EvalRequest:
    prompts = [make_prompt(prompt_id) for prompt_id in range(1, 1 + num_prompts)]
    sampling = Sampling(temperature=temperature)
    return EvalRequest(request_id=5, seed=11, sampling=sampling, prompts=prompts, samples=list(samples))


def join(
    engine: FakeEngine,
    score: Callable = score_first_token,
    *,
    deterministic: bool = False,
    heartbeat_s: float = HEARTBEAT_S,
    save_partials_s: float | None = None,
) -> tuple[RolloutWorker, FakeReplay]:
    """A worker and the server that it is going to join."""
    replay = FakeReplay()
    config = RolloutConfig(
        slots=engine.num_slots,
        group_size=GROUP_SIZE,
        deterministic=deterministic,
        save_partials_s=save_partials_s,
    )
    rollouts = SingleTurn(engine, score, one_at_a_time=deterministic, continues=config.continues)
    return RolloutWorker(0, config, heartbeat_s, engine, rollouts, say_tokens, replay.address), replay


@asynccontextmanager
async def joined(
    engine: FakeEngine,
    score: Callable = score_first_token,
    *,
    deterministic: bool = False,
    heartbeat_s: float = HEARTBEAT_S,
    save_partials_s: float | None = None,
) -> AsyncIterator[tuple[RolloutWorker, FakeReplay]]:
    """A running worker and the server that has welcomed it. The worker's failure fails the test."""
    worker, replay = join(
        engine, score, deterministic=deterministic, heartbeat_s=heartbeat_s, save_partials_s=save_partials_s
    )
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(worker.run())
        try:
            await replay.expect(Hello)
            yield worker, replay
        finally:
            running.cancel()
            replay.close()
