"""A server that plays W&B's GraphQL and its uploads, for one entity `me`, on loopback.

In: requests of W&B's own packages. Out: answers as its server gives them, of what was sent so far. `views`, `runs` and
`lines` keep what was sent. With `mood` it answers late, with errors, or never.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any, Literal

Mood = Literal["well", "slow", "errors", "silent"]
SLOW_S = 3.0
KEY = "0123456789" * 4
"""A login that W&B's packages accept."""


class WandbServer:
    """What was sent, and how to answer."""

    def __init__(self, mood: Mood = "well") -> None:
        self.mood: Mood = mood
        self.over = Event()
        self.operations: list[str] = []
        self.views: dict[str, dict[str, Any]] = {}
        """The variables of the newest save, by the view's name."""
        self.runs: dict[str, dict[str, Any]] = {}
        """The variables of the first upsert, by the run's id."""
        self.lines: list[dict[str, Any]] = []
        """History, as it was uploaded."""
        self.url = ""

    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def answer(self, path: str, body: Any) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            files = body.get("files", {}) if isinstance(body, dict) else {}
            self.lines += map(json.loads, files.get("wandb-history.jsonl", {}).get("content", []))
            return {}
        if path != "/graphql":
            return {}
        self.operations.append(operation := body["query"].split("(")[0].split("{")[0].split()[1])
        return {"data": self.data_of(operation, body.get("variables") or {})}

    def data_of(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p1", "internalId": "7", "name": given.get("project", ""), "entity": {"id": "e", "name": "me"}}
        if operation in ("Viewer", "GetDefaultEntity"):
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if operation == "View":
            view = self.views.get(given["viewName"])
            node = view and {"id": view["id"], "displayName": view["displayName"], "spec": view["spec"]}
            return {"project": {"allViews": {"edges": [{"node": node}] if node else []}}}
        if operation in ("UpsertView2", "upsertView"):
            view = self.views[given["name"]] = {**given, "id": given.get("id") or f"view-{len(self.views)}"}
            author = {"id": "u", "username": "me", "name": "me", "photoUrl": "", "admin": False, "email": ""}
            times = dict.fromkeys(("createdAt", "updatedAt"), "2026-11-21T00:00:00")
            place = {"id": "p1", "name": given["projectName"], "entityName": "me"}
            return {"upsertView": {"view": {**view, "user": author, "project": place, **times}, "inserted": True}}
        if operation == "UpsertBucket":
            self.runs.setdefault(given["name"], given)
            bucket = {"id": "b", "name": given["name"], "displayName": given.get("displayName"), "project": project}
            return {"upsertBucket": {"bucket": bucket | {"config": "{}", "historyLineCount": 0}, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {"project": project, "models": {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}}


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if server.mood == "silent":
                server.over.wait()
            elif server.mood == "slow":
                time.sleep(SLOW_S)
            body = json.loads(sent) if sent[:1] == b"{" else None
            answer = b"no" if server.mood == "errors" else json.dumps(server.answer(self.path, body)).encode()
            self.send_response(500 if server.mood == "errors" else 200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    return Handler


class _Http(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """W&B's packages end without taking leave of their connections."""


@contextmanager
def wandb_server(mood: Mood = "well") -> Iterator[WandbServer]:
    """It answers until the context ends."""
    server = WandbServer(mood)
    http = _Http(("127.0.0.1", 0), _handler(server))
    server.url = f"http://127.0.0.1:{http.server_port}"
    Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        http.shutdown()
        http.server_close()
