"""A server that speaks OpenEnv's wire, as openenv-core 0.3.0 was recorded: `GET /schema`, episodes at `/ws`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Request, Response, ServerConnection, serve

METADATA = {"additionalProperties": True, "title": "Metadata", "type": "object"}
SAYS = {"message": {"title": "Message", "type": "string"}}
MOVES = {"row": {"title": "Row", "type": "integer"}, "column": {"title": "Column", "type": "integer"}}
INVALID = {
    "message": "Invalid message",
    "code": "VALIDATION_ERROR",
    "errors": [{"type": "missing", "loc": ["row"], "msg": "Field required", "input": {}}],
}


class FakeServer:
    """Echoes what it is told. The answer in a text ends an episode; a move needs a row."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        self.url = ""
        self.heard: list[list[dict[str, Any]]] = []
        """Messages of each connection."""
        self.num_open = 0

    def schema(self) -> dict[str, Any]:
        action = {"properties": {"metadata": METADATA} | self.fields, "required": list(self.fields), "type": "object"}
        return {"action": action | {"additionalProperties": False}, "observation": {}, "state": {}}

    def respond(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/schema":
            return connection.respond(HTTPStatus.OK, json.dumps(self.schema()))
        return None if request.path == "/ws" else connection.respond(HTTPStatus.NOT_FOUND, "")

    async def handle(self, connection: ServerConnection) -> None:
        heard: list[dict[str, Any]] = []
        self.heard.append(heard)
        self.num_open += 1
        async for line in connection:
            heard.append(json.loads(line))
            kind, data = self.answer(heard[0]["data"], heard[-1])
            await connection.send(json.dumps({"type": kind, "data": data}))
        self.num_open -= 1

    def answer(self, row: dict[str, Any], message: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        action = message["data"]
        if message["type"] == "reset":
            return "observation", {"observation": {"text": f"go {action['seed']}"}, "reward": None, "done": False}
        if action == {"message": "boom"}:
            return "error", {"message": "on fire", "code": "EXECUTION_ERROR"}
        if "message" in action:
            right = row["answer"] in action["message"]
            said = {"text": f"you said {action['message']}", "metadata": {}}
            return "observation", {"observation": said, "reward": float(right), "done": right}
        if "row" not in action:
            return "error", INVALID
        return "observation", {"observation": {"board": [action["row"]], "legal": True}, "reward": 0.5, "done": False}


@asynccontextmanager
async def serving(fields: dict[str, Any]) -> AsyncIterator[FakeServer]:
    server = FakeServer(fields)
    async with serve(server.handle, "127.0.0.1", 0, process_request=server.respond) as listening:
        [socket] = listening.sockets
        server.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        yield server
