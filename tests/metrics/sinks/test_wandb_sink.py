from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from asyncdapo.errors import ConfigError
from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.samples import COLUMNS
from asyncdapo.metrics.sinks.wandb_login import choose_mode
from asyncdapo.metrics.sinks.wandb_sink import describe, open_run, run_id
from tests.metrics.documented import EVERY


class NoServerError(Exception):
    """What W&B raises when it can't reach its server."""


class Unreachable:
    """A server, to which W&B keeps trying to connect until it is told to give up."""

    def __init__(self) -> None:
        self.tries = False

    def start(self, mode: str) -> str:
        if mode == "online":
            self.tries = True
            raise NoServerError("no route")
        assert not self.tries, "the run is in use"
        return f"run {mode}"

    def give_up(self) -> None:
        self.tries = False


def environment(home: Path, **variables: str) -> dict[str, str]:
    return {"HOME": str(home), **variables}


def test_auto_is_offline_without_a_login(tmp_path: Path):
    assert choose_mode(MetricsConfig(), environment(tmp_path)) == "offline"


def test_auto_is_online_with_an_api_key_or_a_netrc_entry_for_the_server_in_use(tmp_path: Path):
    assert choose_mode(MetricsConfig(), environment(tmp_path, WANDB_API_KEY="k")) == "online"
    (tmp_path / ".netrc").write_text("machine wandb.example.org login user password k\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert choose_mode(MetricsConfig(), environment(tmp_path)) == "offline"
    own = environment(tmp_path, WANDB_BASE_URL="https://wandb.example.org:8080")
    assert choose_mode(MetricsConfig(), own) == "online"


def test_the_variable_of_wandb_overrules_auto_but_not_the_config(tmp_path: Path):
    variables = environment(tmp_path, WANDB_API_KEY="k", WANDB_MODE="offline")
    assert choose_mode(MetricsConfig(), variables) == "offline"
    assert choose_mode(MetricsConfig(wandb="online"), variables) == "online"


def test_online_without_a_login_is_a_configuration_error_instead_of_a_question(tmp_path: Path):
    with pytest.raises(ConfigError, match="metrics.wandb: needs a login"):
        choose_mode(MetricsConfig(wandb="online"), environment(tmp_path))


def test_an_unreachable_server_takes_a_run_offline():
    server = Unreachable()
    assert open_run(server.start, server.give_up, "online", NoServerError) == "run offline"


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Two launches of one run, each in a process of its own."""
    run_dir = tmp_path_factory.mktemp("run")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    said = []
    for first_step in (1, 3):
        command = [sys.executable, "-m", "tests.metrics.sinks.offline_run", str(run_dir), str(first_step)]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
        said.append(done.stdout.splitlines() + done.stderr.splitlines())
    return Launches(run_dir, [lines[:-1] for lines in said], [json.loads(lines[-1]) for lines in said])


@dataclass
class Launches:
    run_dir: Path
    said: list[list[str]]
    stored: list[dict]
    """What W&B will upload of each."""


def test_an_offline_run_holds_every_documented_metric_with_its_unit(launches: Launches):
    for launch, first in zip(launches.stored, (1, 3), strict=True):
        lines = [row for row in launch["history"] if "replay/queued" in row]
        assert [row["step"] for row in lines] == [first, first + 1]
        assert all({name: row.get(name) for name in EVERY} == dict.fromkeys(EVERY, row["step"] / 2) for row in lines)
        assert {name: launch["config"]["units"][name] for name in EVERY} == EVERY


def test_undone_steps_are_marked(launches: Launches):
    marks = [(row["step"], row["undone_by"]) for row in launches.stored[1]["history"] if "undone_by" in row]
    assert marks == [(3, 5), (4, 5)]


def test_in_place_of_wandbs_own_output_one_line_says_what_uploads_the_run(launches: Launches):
    said = f"metrics: W&B is offline: asyncdapo sync {os.path.relpath(launches.run_dir)} uploads it"
    assert launches.said == [[said], [said]]


def test_samples_of_a_step_are_a_table_beside_its_numbers(launches: Launches):
    table, _ = sorted(launches.run_dir.glob("wandb/offline-run-*/files/media/table/samples*.json"))
    written = json.loads(table.read_text())
    assert written["columns"] == list(COLUMNS)
    row = [2, 7, "Q: 47*86", "[model]\n<b>\n[environment]\n4042", 1, 1, 2, 9, "stop", "1 to 2"]
    assert written["data"] == [row, row]


def test_a_resumed_run_keeps_its_id_also_with_other_settings(launches: Launches):
    records = list(launches.run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert [record.name for record in records] == [f"run-{run_id(launches.run_dir)}.wandb"] * 2
    assert [launch["config"]["run"]["steps"] for launch in launches.stored] == [3, 5]


def test_an_online_run_says_its_address():
    url = "https://wandb.ai/me/asyncdapo/runs/1a2b3c4d"
    assert describe(url, Path("run")) == f"W&B: {url}"


def test_each_run_directory_has_an_id_of_its_own(tmp_path: Path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    assert run_id(tmp_path / "one") == run_id(tmp_path / "one") != run_id(tmp_path / "other")
    (tmp_path / "one" / "wandb.id").write_text("")  # its writer died
    assert run_id(tmp_path / "one") == run_id(tmp_path / "one") != ""
