"""HTTP/1.1 on 127.0.0.1, for clients that may do anything.

    socket ──bytes──▶ h11 ──▶ `HttpRequest` ──handler──▶ `HttpAnswer` ──▶ socket

In: a handler. Out: a port that it answers on. Invariants: a client that goes away cancels the handler that works for
it; a connection has one request at a time, of bounded size, and ends if none is complete in time; there is a bounded
number of connections. Does not own: what is asked and answered (`endpoint`).
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import h11
import msgspec

HOST = "127.0.0.1"
MAX_HEADER_BYTES = 1 << 16
REQUEST_TIMEOUT_S = 75.0
"""Of a connection without a complete request. Clients close their idle ones earlier."""
MAX_REASON_CHARS = 200
MAX_SHARE_OF_FILES = 0.5
"""Connections among the files that the process may have open."""


@dataclass(frozen=True, kw_only=True)
class HttpRequest:
    """A request. Names of headers are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, kw_only=True)
class HttpAnswer:
    """Its answer."""

    status: int = 200
    reason: str = ""
    """Behind the status, for clients that show nothing else of an error. ASCII."""
    content_type: str = "application/json"
    body: bytes


Handler = Callable[[HttpRequest], Awaitable[HttpAnswer]]


def problem(status: int, message: str, code: str | None = None) -> HttpAnswer:
    """An error in the form that OpenAI's clients expect."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code or status}
    reason = "".join(char if " " <= char <= "~" else "?" for char in message[:MAX_REASON_CHARS])
    return HttpAnswer(status=status, reason=reason, body=msgspec.json.encode({"error": error}))


class HttpServer:
    """The open port. Create it with `start`."""

    def __init__(self, handler: Handler, max_body_bytes: int) -> None:
        self.handler, self.max_body_bytes = handler, max_body_bytes
        self.max_connections = int(MAX_SHARE_OF_FILES * resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self.connections: set[Connection] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._server: asyncio.Server | None = None

    @classmethod
    async def start(cls, handler: Handler, max_body_bytes: int) -> HttpServer:
        """Listen on a free port."""
        server = cls(handler, max_body_bytes)
        backlog = server.max_connections  # many programs begin at once, while this process may be busy
        loop = asyncio.get_running_loop()
        server._server = await loop.create_server(lambda: Connection(server), HOST, 0, backlog=backlog)
        return server

    @property
    def url(self) -> str:
        assert self._server is not None, "started"
        return f"http://{HOST}:{self._server.sockets[0].getsockname()[1]}"

    async def failed(self) -> None:
        """Wait until a handler raises, which is a bug of ours, and raise that."""
        await asyncio.shield(self._failed)

    def note_failure(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    async def stop(self) -> None:
        """Close the port and every connection."""
        assert self._server is not None, "started"
        self._server.close()
        answering = [connection.abort() for connection in list(self.connections)]
        await asyncio.gather(*filter(None, answering), return_exceptions=True)


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._request: h11.Request | None = None
        self._body = bytearray()
        self._answering: asyncio.Task[HttpAnswer] | None = None
        self._num_ahead = 0
        """Bytes received while a request is being answered."""
        self._over = False
        """Whether nothing more is read: the client gets the answer, and is to close."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._server.connections.add(self)
        self._begin()
        if len(self._server.connections) > self._server.max_connections:
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.abort()

    def abort(self) -> asyncio.Task[HttpAnswer] | None:
        """End the connection. Returns the handler that is being cancelled."""
        self._server.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._answering is not None:
            self._answering.cancel()
        if self._transport is not None:
            self._transport.abort()
        return self._answering

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        self._num_ahead += len(data)
        if self._answering is not None and self._num_ahead > MAX_HEADER_BYTES:
            self.abort()
            return
        self._http.receive_data(data)
        if self._answering is None:
            self._read()

    # ------------------------------------------------------------------------------------------------------- a request

    def _begin(self) -> None:
        """Wait for a request."""
        self._request, self._answering = None, None
        self._body.clear()
        self._timer = asyncio.get_running_loop().call_later(REQUEST_TIMEOUT_S, self.abort)

    def _read(self) -> None:
        """What has arrived, up to the end of a request."""
        try:
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Request):
                    self._request = event
                    if self._http.they_are_waiting_for_100_continue:
                        self._say(h11.InformationalResponse(status_code=100, headers=[]))
                elif isinstance(event, h11.Data):
                    self._body += event.data
                    if len(self._body) > self._server.max_body_bytes:
                        self._answer(problem(413, f"a body has at most {self._server.max_body_bytes} bytes"))
                        return
                elif isinstance(event, h11.EndOfMessage):
                    self._handle()
                    return
                else:  # more data is needed, or there is none
                    return
        except h11.RemoteProtocolError as error:
            self._answer(problem(error.error_status_hint, f"no HTTP/1.1 request: {error}"))

    def _handle(self) -> None:
        assert self._request is not None, "its end has arrived"
        request = HttpRequest(
            method=self._request.method.decode("ascii"),
            path=self._request.target.decode("ascii").partition("?")[0],
            headers={name.decode("ascii"): value.decode("latin-1") for name, value in self._request.headers},
            body=bytes(self._body),
        )
        if self._timer is not None:
            self._timer.cancel()
        self._num_ahead = 0
        self._answering = asyncio.create_task(self._call(request))
        self._answering.add_done_callback(self._note_answer)

    async def _call(self, request: HttpRequest) -> HttpAnswer:
        return await self._server.handler(request)

    def _note_answer(self, task: asyncio.Task[HttpAnswer]) -> None:
        if task.cancelled():
            self.abort()
        elif error := task.exception():
            self._server.note_failure(error)
            self._answer(problem(500, "the worker has failed"))
        else:
            self._answer(task.result())

    # ------------------------------------------------------------------------------------------------------ its answer

    def _answer(self, answer: HttpAnswer) -> None:
        """Send it, and go on with the next request if the client may send one."""
        if self._http.our_state not in (h11.SEND_RESPONSE, h11.IDLE):  # it has broken the protocol before
            self.abort()
            return
        headers = [("content-type", answer.content_type), ("content-length", str(len(answer.body)))]
        self._say(h11.Response(status_code=answer.status, headers=headers, reason=answer.reason.encode()))
        if self._request is None or self._request.method != b"HEAD":
            self._say(h11.Data(data=answer.body))
        self._say(h11.EndOfMessage())
        if self._timer is not None:
            self._timer.cancel()
        self._begin()
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            self._read()
        elif self._transport is not None:
            self._over = True
            self._transport.write_eof()  # a close would take the answer from a client that is still sending

    def _say(self, event: h11.Response | h11.InformationalResponse | h11.Data | h11.EndOfMessage) -> None:
        if self._transport is not None:
            self._transport.write(self._http.send(event) or b"")
