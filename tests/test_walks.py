"""How far a reader has to go with "go to definition" (`tests/walks.py`): two walks, and what can be followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.walks import ROOT, WALKS, Code, files_of, walk

MOST = {"a scored group becomes a gradient": (40, 56), "weights come to an engine": (25, 36)}
"""Files on the way; and with those that the functions on the way use."""


@pytest.fixture(scope="module")
def package() -> Code:
    return Code(ROOT, "asyncdapo")


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_stays_within_its_number_of_files(package: Code, title: str) -> None:
    for leg in WALKS[title]:
        assert walk(package, *leg), f"no way from {leg[0]} to {leg[1]}"
    on_the_way, seen = files_of(package, WALKS[title])
    most_on_the_way, most_seen = MOST[title]
    assert len(on_the_way) <= most_on_the_way, on_the_way
    assert len(seen) <= most_seen, seen


def test_a_way_leads_through_attributes_protocols_and_events_and_past_what_has_no_exit(tmp_path: Path) -> None:
    files = {
        "ports.py": """
class Port(Protocol):
    def load(self): ...
""",
        "engine.py": """
class Engine:
    def load(self):
        finish()
    def stop(self): ...
def finish(): ...
""",
        "worker.py": """
from asyncdapo.ports import Port
class Worker:
    def __init__(self, port: Port) -> None:
        self._ports = {0: port}
    def run(self):
        self.pause()
        self._ports[0].load()
    def pause(self): ...
""",
        "replay/core/events.py": "class Arrived: ...",
        "main.py": """
from asyncdapo.replay.core import events as core
from asyncdapo.worker import Worker
def begin():
    return core.Arrived()
def apply(event, worker: Worker):
    match event:
        case core.Arrived():
            worker.run()
""",
    }
    for name, text in files.items():
        path = tmp_path / "asyncdapo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    way = walk(Code(tmp_path, "asyncdapo"), "main.begin", "engine.finish")
    assert way == [
        f"asyncdapo.{name}"
        for name in ("engine.Engine.load", "engine.finish", "main.apply", "main.begin", "worker.Worker.run")
    ]
