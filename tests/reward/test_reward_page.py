"""docs/reward.md: its examples run as they stand there, and its tables list all verifiers and numbers."""

import http.server
import json
import re
import threading
from pathlib import Path

import pytest

from asyncdapo.errors import RewardError
from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.registry import VERIFIERS
from asyncdapo.reward.wire import METRICS
from tests.asynchronous import asynchronous

PAGE = (Path(__file__).parents[2] / "docs" / "reward.md").read_text()


def example(name, folder):
    """The file that a reader would make of an example."""
    [code] = re.findall(rf"<!-- example: {name} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    path = folder / "example.py"
    path.write_text(code)
    return path


@asynchronous
async def test_the_function_of_the_page_gives_part_of_the_credit(tmp_path) -> None:
    pool = ScorerPool(f"{example('sync', tmp_path)}:closeness", 1, 10.0)
    await pool.start()
    said = await pool.verify(["Answer: 6", "Answer: 6.25", "Answer: 60", "six"], "6")
    assert [verdict.value for verdict in said] == [1.0, 0.75, 0.0, 0.0]
    await pool.stop()


class Judge(http.server.BaseHTTPRequestHandler):
    """Busy at the first request for each response."""

    seen: set[str] = set()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        busy = asked["response"] not in self.seen
        self.seen.add(asked["response"])
        self.send_response(503 if busy else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"correct": asked["response"] == asked["answer"], "confidence": 0.5}).encode())

    def log_message(self, *parts: object) -> None:
        pass


@asynchronous
async def test_the_async_function_of_the_page_asks_a_judge_until_it_answers(tmp_path, monkeypatch) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}")
        verifier = f"{example('async', tmp_path)}:judge"
        pools = [ScorerPool(verifier, 1, 10.0, concurrency=4, retries=retries) for retries in (0, 1)]
        try:
            for pool in pools:
                await pool.start()
            with pytest.raises(RewardError, match=r"HTTPError: HTTP Error 503.* \(in "):
                await pools[0].verify(["impatient"], "6")
            said = await pools[1].verify(["6", "7", "8", "9"], "6")
            assert [verdict.value for verdict in said] == [1.0, 0.0, 0.0, 0.0]
            assert all(verdict.metrics == {"judge_confidence": 0.5} for verdict in said)
        finally:
            for pool in pools:
                await pool.stop()
            server.shutdown()


def test_the_page_lists_every_verifier_and_every_number() -> None:
    rows = set(re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE))
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {*VERIFIERS, *METRICS}
