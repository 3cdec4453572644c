"""The endpoint: the worker's engine as a server on 127.0.0.1, for programs that call the model by themselves.

    POST /inference/v1/generate   token ids in; token ids, log-probs and versions out
    POST /v1/chat/completions     messages and tools in; a message out
    GET  /v1/models               the model, and the longest context

    key in `Authorization: Bearer` or `X-Session-ID` ──▶ the attempt whose call it is ──▶ `Attempt.sample` ──▶ answer

In: attempts at episodes; calls. Out: answers; the attempts have what was sampled. Invariants: a key is of one attempt,
random, and worthless after its end; the tokens that are trained on are those that the attempt has, whatever a client
makes of its answers. Statuses: 400 for what can't be done or doesn't fit, which clients don't repeat; 401 for a wrong
key; 410 after the end; 429 for too many calls at once. Does not own: the sampled tokens (`several_turns/attempt`), how
messages become tokens (`chat`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from asyncdapo.errors import EpisodeOver
from asyncdapo.eval_messages import Sampling
from asyncdapo.rollout.endpoint.chat import Chat
from asyncdapo.rollout.endpoint.chat_wire import chat_answer, read_chat
from asyncdapo.rollout.endpoint.http import HttpAnswer, HttpRequest, HttpServer, problem
from asyncdapo.rollout.endpoint.wire import Asked, GenerateBody, Refused, generated, models, read_body, read_sampling
from asyncdapo.rollout.engine import Sample
from asyncdapo.rollout.several_turns.attempt import Attempt

BODY_BYTES_PER_TOKEN = 64
"""Of a full context: as digits, or as text in JSON."""
OTHER_BODY_BYTES = 1 << 20
"""Tools and parameters."""
MAX_CALLS = 32
"""Of an attempt at the same time."""
REMEMBERED = 4096
"""Keys of the latest attempts that are over."""
LIMITS = {
    "length": "maximum context length: no room is left in environment.max_context or rollout.max_response_length",
    "turns": "the episode has had environment.max_turns calls",
}


class Session:
    """An attempt, as far as its calls need it."""

    def __init__(self, attempt: Attempt, chat: Chat, on_busy: Callable[[bool], None]) -> None:
        """`on_busy`: called with whether any call is under way, whenever that changes."""
        self.attempt, self.chat = attempt, chat
        self.calls: set[asyncio.Task[HttpAnswer]] = set()
        self._on_busy = on_busy

    async def call(self, work: Coroutine[Any, Any, HttpAnswer]) -> HttpAnswer:
        """Its answer. Raises Refused if the attempt ends first."""
        task = asyncio.create_task(work)
        self.calls.add(task)
        if len(self.calls) == 1:
            self._on_busy(True)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            self.calls.discard(task)
            if not self.calls:
                self._on_busy(False)
        if task.cancelled():
            raise over()
        return task.result()


def over() -> Refused:
    return Refused(410, "the episode is over")


class Endpoint:
    """Answers calls for the attempts that are under way."""

    def __init__(self, max_context: int, new_chat: Callable[[], Chat]) -> None:
        """`new_chat`: the conversations of an attempt, none so far."""
        self._max_context, self._new_chat = max_context, new_chat
        self._sessions: dict[str, Session] = {}
        self._over: dict[str, None] = {}
        """The latest `REMEMBERED` keys that are worthless now, in the order in which they became so."""
        self._counts: Counter[str] = Counter()
        self._server: HttpServer | None = None

    async def start(self) -> None:
        """Open the port."""
        most = OTHER_BODY_BYTES + BODY_BYTES_PER_TOKEN * self._max_context
        self._server = await HttpServer.start(self._handle, most)

    async def stop(self) -> None:
        await self._open.stop()

    async def failed(self) -> None:
        """Wait until it fails, which is a bug, and raise that."""
        await self._open.failed()

    @property
    def url(self) -> str:
        """Without a path."""
        return self._open.url

    def gauges(self) -> dict[str, float]:
        """Cumulative: `endpoint_calls`, `refused_calls`, and `overridden_calls`, whose sampling wasn't used."""
        return {key: self._counts[key] for key in ("endpoint_calls", "refused_calls", "overridden_calls")}

    @asynccontextmanager
    async def session(self, attempt: Attempt, on_busy: Callable[[bool], None]) -> AsyncIterator[str]:
        """The key with which a program may make calls, until the context ends."""
        key = secrets.token_urlsafe(24)
        session = self._sessions[key] = Session(attempt, self._new_chat(), on_busy)
        try:
            yield key
        finally:
            del self._sessions[key]
            self._over[key] = None
            if len(self._over) > REMEMBERED:
                del self._over[next(iter(self._over))]
            for call in list(session.calls):
                call.cancel()
            await asyncio.gather(*session.calls, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------------- its calls

    async def _handle(self, request: HttpRequest) -> HttpAnswer:
        self._counts["endpoint_calls"] += 1
        try:
            return await self._route(request)
        except Refused as refused:
            answer = refused.answer
        except RecursionError:
            answer = problem(400, "the body is nested too deeply")
        self._counts["refused_calls"] += 1
        return answer

    async def _route(self, request: HttpRequest) -> HttpAnswer:
        session = self._session_of(request.headers)
        match request.method, request.path:
            case "GET", "/v1/models":
                return models(self._max_context)
            case "POST", ("/inference/v1/generate" | "/v1/chat/completions") as path:
                if len(session.calls) >= MAX_CALLS:
                    raise Refused(429, f"at most {MAX_CALLS} calls at the same time")
                respond = self._generate if path == "/inference/v1/generate" else self._chat
                return await session.call(respond(session, request.body))
        raise Refused(404, f"there is no {request.method} {request.path[:100]}")

    def _session_of(self, headers: Mapping[str, str]) -> Session:
        keys = (headers.get("x-session-id", ""), headers.get("authorization", "").removeprefix("Bearer "))
        for key in keys:
            if key in self._sessions:
                return self._sessions[key]
        if any(key in self._over for key in keys):
            raise over()
        raise Refused(401, "no such key: an episode's calls have the api_key that its program was given")

    async def _generate(self, session: Session, content: bytes) -> HttpAnswer:
        number, body = self._counts["endpoint_calls"], read_body(content, GenerateBody)
        if body.stream:
            raise Refused(400, "stream isn't supported here")
        asked = self._asked(body.sampling_params, session.attempt.wanted.sampling)
        return generated(f"call-{number}", await self._sample(session.attempt, body.token_ids, asked))

    async def _chat(self, session: Session, content: bytes) -> HttpAnswer:
        number, raw = self._counts["endpoint_calls"], read_body(content, dict[str, Any])
        body, asked = read_chat(raw), self._asked(raw, session.attempt.wanted.sampling)
        prompt_ids = session.chat.prompt(body)
        sample = await self._sample(session.attempt, prompt_ids, asked)
        return chat_answer(session.chat.take(body, number, prompt_ids, sample), body)

    def _asked(self, params: Mapping[str, object], run: Sampling) -> Asked:
        asked = read_sampling(params, run)
        self._counts["overridden_calls"] += asked.num_overrides > 0
        return asked

    async def _sample(self, attempt: Attempt, prompt_ids: list[int], asked: Asked) -> Sample:
        try:
            return await attempt.sample(prompt_ids, asked.max_tokens)
        except EpisodeOver as over:
            raise Refused(400, LIMITS[over.finish_reason], "context_length_exceeded") from over
        except ValueError as error:
            raise Refused(400, str(error)) from error

    @property
    def _open(self) -> HttpServer:
        assert self._server is not None, "started"
        return self._server
