"""A client of the endpoint that sees every byte, and the endpoint over a small engine."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from asyncdapo.eval_messages import Sampling
from asyncdapo.messages import Prompt
from asyncdapo.rollout.endpoint.endpoint import Endpoint
from asyncdapo.rollout.job import Job
from asyncdapo.rollout.several_turns.attempt import Attempt, TurnLimits, Wanted
from tests.rollout.fakes import FakeEngine, make_lease

MAX_CONTEXT = 1000
MAX_RESPONSE_LENGTH = 20
SEED = 7


def make_attempt(
    engine: Any, *, seed: int = SEED, max_turns: int = 8, prompt: Prompt | None = None, **sampling: float
) -> Attempt:
    lease = make_lease(7)
    wanted = Wanted(
        job=Job(lease, 1, lambda: None),
        prompt=prompt or lease.prompt,
        seed=seed,
        sampling=Sampling(**{"max_tokens": MAX_RESPONSE_LENGTH} | sampling),
    )
    return Attempt(engine, wanted, TurnLimits(max_turns=max_turns, max_context=MAX_CONTEXT), defaultdict(float))


@dataclass
class Called:
    """An endpoint, an attempt, and the key to it."""

    endpoint: Endpoint
    attempt: Attempt
    key: str
    busy: list[bool]

    async def post(self, body: Any, path: str = "/inference/v1/generate", **headers: str) -> tuple[int, Any]:
        return await ask(self.endpoint.url, "POST", path, body, {"authorization": f"Bearer {self.key}"} | headers)

    async def stream(self, body: Any, path: str) -> list[str]:
        """Its server-sent events."""
        sent = request("POST", path, body, {"authorization": f"Bearer {self.key}"})
        status, answer = await exchange(self.endpoint.url, sent)
        assert status == 200
        return [event.removeprefix("data: ") for event in answer.decode().split("\n\n") if event]

    async def generate(self, token_ids: list[int], **sampling: Any) -> tuple[int, Any]:
        return await self.post({"token_ids": token_ids, "sampling_params": sampling})


@asynccontextmanager
async def called(
    engine: FakeEngine | None = None, new_chat: Callable[[], Any] = lambda: None, **attempt: Any
) -> AsyncIterator[Called]:
    endpoint = Endpoint(MAX_CONTEXT, new_chat)
    await endpoint.start()
    one, busy = make_attempt(engine or FakeEngine(), **attempt), []
    try:
        async with endpoint.session(one, busy.append) as key:
            yield Called(endpoint, one, key, busy)
    finally:
        await endpoint.stop()


async def ask(url: str, method: str, path: str, body: Any = None, headers: Any = ()) -> tuple[int, Any]:
    """Status and JSON of the answer."""
    status, answer = await exchange(url, request(method, path, body, headers))
    return status, json.loads(answer) if answer else None


def request(method: str, path: str, body: Any, headers: Any) -> bytes:
    """Its bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{name}: {value}" for name, value in {**dict(headers), "content-length": len(content)}.items()]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", "connection: close", *lines, "", ""])
    return head.encode() + content


async def exchange(url: str, sent: bytes) -> tuple[int, bytes]:
    """Status and body of what comes back for these bytes, once the other end closes."""
    reader, writer = await dial(url)
    try:
        writer.write(sent)
        answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def dial(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))
