"""`asyncdapo watch RUN… --web`: a page on loopback that shows runs.

    GET /KEY/                          the page; page.js, page.css and plotly.js beside it
        /KEY/runs                      of each run what it does now
        /KEY/charts?run=0              the numbers of every chart
        /KEY/gantt?run=0               what all processes did in the latest steps
        /KEY/groups?run=0&step=12      groups of a batch
        /KEY/group?run=0&id=5          a group: prompt, completions
        /KEY/completion?run=0&id=5&sample=0

In: run directories. Out: HTTP on 127.0.0.1. It only reads files. KEY is drawn anew at each start, and everything
without it is 404: other users of the machine, and pages of other sites in the same browser, don't know it. Everything
that the page needs comes from here, and its rules (Content-Security-Policy) forbid it any other address. Does not own:
the answers (`site`).
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from asyncdapo.controller.watch.site import Site
from asyncdapo.errors import UserError
from asyncdapo.records.record import BadRecord

FOLDER = Path(__file__).with_name("page")
RULES = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data: blob:"
)
"""Plotly writes its own styles into the page."""
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def plotly_file() -> Path:
    """Plotly's program. Raises UserError if the package is missing."""
    found = find_spec("plotly")
    if found is None or found.origin is None:
        raise UserError("watch --web: needs plotly (pip install 'asyncdapo[web]')")
    return Path(found.origin).with_name("package_data") / "plotly.min.js"


class Server(ThreadingHTTPServer):
    """Serves one site on loopback."""

    daemon_threads = True

    def __init__(self, site: Site, port: int) -> None:
        """Port 0 is any free one. Raises UserError if the port is in use, or isn't one."""
        self.key = secrets.token_urlsafe(16)
        self.answers: dict[str, Callable[..., Any]] = {
            "runs": site.runs,
            "charts": site.charts,
            "gantt": site.gantt,
            "groups": site.groups,
            "group": site.group,
            "completion": site.completion,
        }
        self.files = {"": FOLDER / "page.html", "plotly.js": plotly_file()}
        self.files |= {name: FOLDER / name for name in ("page.js", "page.css")}
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: {error} (choose another, or 0 for any)") from error

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.server_port}/{self.key}/"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride] (it is served by no other)

    def do_GET(self) -> None:  # noqa: N802 - the name that the standard library calls
        url = urlsplit(self.path)
        _, key, *rest = url.path.split("/")
        name = "/".join(rest)
        if not rest or not secrets.compare_digest(key.encode(), self.server.key.encode()):
            self._send_text(HTTPStatus.NOT_FOUND, "not here: take the whole address that `asyncdapo watch` prints")
        elif name in self.server.files:
            path = self.server.files[name]
            self._send(HTTPStatus.OK, KINDS[path.suffix], path.read_bytes(), keep=name == "plotly.js")
        elif name in self.server.answers:
            self._answer(self.server.answers[name], url.query)
        else:
            self._send_text(HTTPStatus.NOT_FOUND, f"nothing is called {name}")

    def _answer(self, answer: Callable[..., Any], query: str) -> None:
        try:
            found = answer(**{name: int(values[0]) for name, values in parse_qs(query).items()})
        except (TypeError, ValueError, OverflowError) as error:
            self._send_text(HTTPStatus.BAD_REQUEST, str(error))
        except (LookupError, BadRecord, UserError, sqlite3.Error) as error:
            self._send_text(HTTPStatus.NOT_FOUND, str(error))
        else:
            self._send(HTTPStatus.OK, "application/json", msgspec.json.encode(found))

    def _send_text(self, status: HTTPStatus, text: str) -> None:
        self._send(status, "text/plain", text.encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes, keep: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", RULES)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "max-age=86400" if keep else "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests aren't logged: their addresses hold the key."""


def serve(run_dirs: Sequence[Path], port: int) -> int:
    """Serve until Ctrl-C, which is no error. Raises UserError if one isn't a run, or the port can't be had."""
    site = Site(run_dirs)
    with Server(site, port) as server:
        threading.Thread(target=site.warm_up, daemon=True).start()
        print(f"{server.address}\nCtrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
