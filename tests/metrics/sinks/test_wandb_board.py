"""The board, report and upload at W&B, by its own packages, against a server of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncdapo.config.config import load_config, to_yaml
from asyncdapo.config.found import find_config
from asyncdapo.metrics.dashboard.sections import SCHEMA, SECTIONS
from asyncdapo.metrics.sinks.wandb_board import version_of
from asyncdapo.metrics.sinks.wandb_upload import waiting_launches
from tests.metrics.documented import EVERY
from tests.metrics.sinks.wandb_server import Mood, WandbServer, wandb_server

ROOT = Path(__file__).parents[3]
VIEW = "nw-asyncdapo-v"


def test_a_board_is_of_the_version_in_its_title():
    assert [version_of(title) for title in ("asyncdapo 12", "asyncdapo", "mine 3", "asyncdapo 2b")] == [12, 0, 0, 0]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with wandb_server() as server:
        yield server


def run(arguments: list[str], server: WandbServer, folder: Path, code: int = 0) -> str:
    """What a Python program prints, in a process of its own that is logged in to the server."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = clean | server.environment() | {"HOME": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def saved(server: WandbServer, view: str = VIEW) -> dict:
    return json.loads(server.views[view]["spec"])["section"]["panelBankConfig"]


SAVE = """
from asyncdapo.metrics.sinks.wandb_board import save_board
print(save_board("me", "project"))
"""


@pytest.mark.soak
def test_the_board_is_saved_once_a_version_and_people_may_change_it(server: WandbServer, tmp_path: Path):
    assert run(["-c", SAVE], server, tmp_path) == "True\n"
    panels = {panel.title: panel for section in SECTIONS for panel in section.panels}
    assert [section["name"] for section in saved(server)["sections"]] == [section.title for section in SECTIONS]
    for section in saved(server)["sections"]:
        assert len(section["panels"]) <= 8
        for config in (panel["config"] for panel in section["panels"]):
            panel = panels.pop(config["chartTitle"])
            assert (config["xAxis"], config["metrics"]) == ("step", list(panel.metrics))
            assert config["yAxisTitle"] == panel.unit
            assert config.get("smoothingWeight", 0) == panel.smoothing
            assert set(config["metrics"]) <= {*EVERY, "undone_by"}
    assert panels == {}

    server.views[VIEW]["spec"] = server.views[VIEW]["spec"].replace("Learning rate", "Rate of learning")
    assert run(["-c", SAVE], server, tmp_path) == "False\n"
    assert "Rate of learning" in server.views[VIEW]["spec"]

    server.views[VIEW]["displayName"] = f"asyncdapo {SCHEMA - 1}"
    assert run(["-c", SAVE], server, tmp_path) == "True\n"
    assert "Rate of learning" not in server.views[VIEW]["spec"]
    assert server.views[VIEW]["id"] == "view-0", "the same view, not another one"


ITSELF = """
from wandb_workspaces.workspaces import Workspace
from asyncdapo.metrics.sinks.wandb_board import workspace
there = Workspace.from_url("https://wandb.ai/me/project?nw=asyncdapo")
there.save_as_new_view()
"""


@pytest.mark.soak
def test_what_is_sent_is_what_the_package_itself_sends_of_the_view_that_it_reads(server: WandbServer, tmp_path: Path):
    run(["-c", SAVE], server, tmp_path)
    run(["-c", ITSELF], server, tmp_path)
    ours, its = server.views.values()
    assert ours.keys() - {"id"} == its.keys() - {"id"}
    assert {key: ours[key] for key in ("type", "displayName", "projectName", "entityName")} == {
        key: its[key] for key in ("type", "displayName", "projectName", "entityName")
    }
    assert json.loads(ours["spec"]) == json.loads(its["spec"])


LAUNCH = """
import sys
from pathlib import Path
from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.jsonl import MetricsFile
from asyncdapo.metrics.sinks.wandb_sink import WandbSink
mode, first = sys.argv[1], int(sys.argv[2])
file = MetricsFile(Path("."), go_on=True)
sink = WandbSink(Path("."), MetricsConfig(), mode, "name", {})
for line in ({"step": step, "reward/mean": step / 2, "time/wall_s": 9.0} for step in (first, first + 1)):
    file.log(line)
    sink.log(line)
sink.mark_undone([first], 4)
sink.close()
"""
COMMAND = "import sys; from asyncdapo.cli import main; sys.exit(main())"


def rows(server: WandbServer, metric: str) -> list[tuple[float, float]]:
    return [(line["step"], line[metric]) for line in server.lines if metric in line]


@pytest.mark.soak
def test_an_online_run_saves_the_board_and_uploads_its_lines(server: WandbServer, tmp_path: Path):
    run(["-c", LAUNCH, "online", "0"], server, tmp_path)
    assert list(server.views) == [VIEW]
    assert rows(server, "reward/mean") == [(0, 0.0), (1, 0.5)]
    assert rows(server, "undone_by") == [(0, 4)]


@pytest.mark.soak
@pytest.mark.parametrize("mood", ["errors", "silent"])
def test_lines_that_the_server_never_took_wait_offline_for_sync(mood: Mood, tmp_path: Path):
    with wandb_server(mood) as unwilling:
        run(["-c", LAUNCH, "online", "0"], unwilling, tmp_path)
    assert len(waiting_launches(tmp_path)) == 1
    assert unwilling.lines == []
    with wandb_server() as server:
        upload_all = "from asyncdapo.metrics.sinks.wandb_upload import *; upload(waiting_launches(Path('.')))"
        run(["-c", upload_all], server, tmp_path)
    assert rows(server, "reward/mean") == [(0, 0.0), (1, 0.5)]


@pytest.mark.soak
def test_sync_uploads_what_waited_once_and_report_shows_the_run(server: WandbServer, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(find_config("quickstart"))))
    for first in ("0", "2"):
        run(["-c", LAUNCH, "offline", first], server, tmp_path)
    assert server.operations == []
    words = run(["-c", COMMAND, "report", str(tmp_path)], server, tmp_path, code=2)
    assert words == f"asyncdapo: {tmp_path}: W&B doesn't have all of it (asyncdapo sync {tmp_path}, then once more)\n"

    said = run(["-c", COMMAND, "sync", str(tmp_path)], server, tmp_path)
    assert said.endswith(f"{tmp_path}: 2 launches uploaded; the board of me/asyncdapo is saved\n")
    assert list(server.runs) == [(tmp_path / "wandb.id").read_text().strip()]
    assert rows(server, "reward/mean") == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]
    assert rows(server, "undone_by") == [(0, 4), (2, 4)]
    again = run(["-c", COMMAND, "sync", str(tmp_path)], server, tmp_path)
    assert again.endswith(f"{tmp_path}: 0 launches uploaded; the board of me/asyncdapo is there already\n")
    assert len(rows(server, "reward/mean")) == 4

    address = run(["-c", COMMAND, "report", str(tmp_path)], server, tmp_path)
    assert address.startswith(f"{server.url}/me/asyncdapo/reports/")
    [report] = [view for view in server.views.values() if view["type"] == "runs"]
    assert report["displayName"] == "quickstart: 3 train steps in 9 s of training."
    grids = [block for block in json.loads(report["spec"])["blocks"] if block["type"] == "panel-grid"]
    assert len(grids) == len(SECTIONS)
    [only] = grids[0]["metadata"]["runSets"]
    assert (tmp_path / "wandb.id").read_text().strip() in json.dumps(only["filters"])


@pytest.mark.soak
def test_what_cant_be_uploaded_keeps_waiting_and_the_server_is_named(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(find_config("quickstart"))))
    with wandb_server("errors") as server:
        run(["-c", LAUNCH, "offline", "0"], server, tmp_path)
        words = run(["-c", COMMAND, "sync", str(tmp_path)], server, tmp_path, code=2)
    assert words.startswith(f"asyncdapo: W&B: Failed to verify credentials with {server.url}")
    assert len(waiting_launches(tmp_path)) == 1
