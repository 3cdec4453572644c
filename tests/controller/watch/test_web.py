"""The page's server over real HTTP: what it answers, and to whom."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from asyncdapo.cli import main
from asyncdapo.controller.watch import site, web
from asyncdapo.controller.watch.site import Site
from asyncdapo.controller.watch.web import Server
from asyncdapo.errors import UserError
from tests.controller.watch.run_files import bound_by_learner, run_files
from tests.controller.watch.test_pages import Bytes
from tests.replay.small_run import finished_run


class Html:
    """A model that answers in HTML."""

    def spell(self, token_ids: Any) -> str:
        return "<script>alert(1)</script>" * len(token_ids)


@pytest.fixture(autouse=True)
def plotly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plotly.min.js"
    file.write_text("// charts")
    monkeypatch.setattr(web, "plotly_file", lambda: file)


@contextmanager
def serving(site: Site) -> Iterator[Server]:
    with Server(site, 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def ask(server: Server, path: str, method: str = "GET") -> tuple[int, str, bytes]:
    """Status, kind and body. `path` stands behind the key."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path if path.startswith("/") else f"/{server.key}/{path}")
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers["Content-Type"], body


def get(server: Server, path: str) -> Any:
    status, kind, body = ask(server, path)
    assert (status, kind) == (200, "application/json; charset=utf-8")
    return json.loads(body)


def test_a_page_and_all_that_it_needs_come_from_loopback(tmp_path: Path) -> None:
    run_dir = run_files(tmp_path / "run", bound_by_learner(6))
    with serving(Site([run_dir])) as server:
        status, kind, page = ask(server, "")
        assert (status, kind) == (200, "text/html; charset=utf-8")
        for name in ("page.js", "page.css", "plotly.js"):
            assert name.encode() in page
            assert ask(server, name)[0] == 200
        assert b"://" not in page
        assert server.address.startswith("http://127.0.0.1:")


def test_who_does_not_know_the_key_gets_nothing(tmp_path: Path) -> None:
    run_dir = run_files(tmp_path / "run", bound_by_learner(6))
    with serving(Site([run_dir])) as server:
        for path in ("/", "/runs", "/wrong/runs", f"/{server.key}", f"/{server.key}x/runs", "//runs"):
            assert ask(server, path)[0] == 404
        assert ask(server, "../../etc/passwd")[0] == 404
        assert ask(server, "runs", "POST")[0] == 501


def test_runs_and_charts_follow_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "FRESH_S", 0.0)
    lines = bound_by_learner(6)
    run_dirs = [run_files(tmp_path / "a", lines[:-1]), run_files(tmp_path / "b", [])]
    with serving(Site(run_dirs)) as server:
        first, second = get(server, "runs")
        assert (first["step"], first["state"], second["lines"]) == (6, "ended early", 0)
        run_files(tmp_path / "a", lines)
        assert get(server, "runs")[0]["step"] == 7
        charts = get(server, "charts?run=0")
        assert charts["step"] == [1, 2, 3, 4, 5, 6, 7]
        [curve] = [chart for chart in charts["charts"] if chart["title"] == "Learning curve"]
        assert curve["columns"][curve["labels"].index("reward")] == [line["reward/mean"] for line in lines]
        assert curve["columns"][curve["labels"].index("greedy accuracy")] == [None] * 7
        assert get(server, "charts?run=1")["step"] == []


def test_a_sample_is_reached_from_its_step_and_html_in_it_is_only_a_text(tmp_path: Path) -> None:
    run_dir = run_files(finished_run(tmp_path), [{"step": 1}])
    with serving(Site([run_dir], lambda run_dir: Html())) as server:
        group_id = get(server, "groups?run=0&step=1")[0]["group_id"]
        assert get(server, f"group?run=0&id={group_id}")["prompt"] == Html().spell([5, 6, 7])
        pieces = get(server, f"completion?run=0&id={group_id}&sample=1")
        assert {piece["text"] for piece in pieces} == {"<script>alert(1)</script>"}
    assert "innerHTML" not in (web.FOLDER / "page.js").read_text()


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("charts?run=x", 400, "invalid literal"),
        ("charts", 400, "missing 1 required"),
        (f"groups?run=0&step={10**30}", 400, "too large"),
        ("charts?run=7", 404, "out of range"),
        ("group?run=0&id=999", 404, "no group 999"),
        ("nothing", 404, "nothing is called nothing"),
    ],
)
def test_what_can_not_be_answered_is_named(tmp_path: Path, path: str, status: int, words: str) -> None:
    run_dir = run_files(finished_run(tmp_path), [])
    with serving(Site([run_dir], lambda run_dir: Bytes())) as server:
        got, _, body = ask(server, path)
        assert (got, words in body.decode()) == (status, True)


def test_a_tokenizer_that_is_gone_is_named_to_who_asks_for_text(tmp_path: Path) -> None:
    def gone(run_dir: Path) -> Bytes:
        raise UserError("model.path: no such directory")

    site = Site([run_files(finished_run(tmp_path), [])], gone)
    site.warm_up()
    with serving(site) as server:
        assert ask(server, "group?run=0&id=1") == (404, "text/plain; charset=utf-8", b"model.path: no such directory")
        assert get(server, "groups?run=0&step=1")


def test_a_port_that_can_not_be_had_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run_files(tmp_path / "run", [])
    with serving(Site([run_dir])) as server, pytest.raises(UserError, match="--port .* in use"):
        Server(Site([run_dir]), server.server_port)
    assert main(["watch", str(run_dir), "--web", "--port", "70000"]) == 2
    assert main(["watch", str(run_dir), "--port", "8000"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "--port 70000: " in first
    assert second == "asyncdapo: --port 8000: is of the page (add --web)"
