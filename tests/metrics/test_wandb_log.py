from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdapo.errors import ConfigError, RunError
from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.samples import COLUMNS
from asyncdapo.metrics.wandb_log import WandbLog, choose_mode, describe, open_run, run_id


class NoServerError(Exception):
    """What W&B raises when it can't reach its server."""


def unreachable(mode: str) -> str:
    if mode == "online":
        raise NoServerError("no route")
    return f"run {mode}"


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


def test_an_unreachable_server_takes_auto_offline_and_fails_what_was_said_to_be_online():
    assert open_run(unreachable, "online", True, NoServerError) == "run offline"
    with pytest.raises(NoServerError):
        open_run(unreachable, "online", False, NoServerError)


def log_offline(run_dir: Path, steps: list[int], settings: dict, more: str = "") -> str:
    """A launch that logs these steps, in a process of its own. Returns what it prints."""
    code = f"""
import logging, sys
from pathlib import Path
from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.wandb_log import WandbLog
logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stdout)
logging.getLogger("metrics").setLevel(logging.INFO)
log = WandbLog(Path({str(run_dir)!r}), MetricsConfig(), "offline", "name", {settings})
for step in {steps}:
    log.log({{"step": step, "reward/filtered_mean": step / 2}})
{more}
log.close()
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_an_offline_run_holds_the_same_names_and_says_in_one_line_what_uploads_it(tmp_path: Path):
    [said] = log_offline(tmp_path, [0, 1, 2], {"run": {"seed": 3}}).splitlines()
    [record] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert said == f"metrics: W&B is offline: wandb sync {os.path.relpath(record.parent)} uploads it"
    assert b"reward/filtered_mean" in record.read_bytes()


def test_samples_of_a_step_are_a_table_beside_its_numbers(tmp_path: Path):
    sample = """Sample(step=2, prompt_id=7, prompt="Q: 47*86", parts=[(1, "<b>"), (0, "4042")], reward=1.0, acc=1.0,
        turns=2, tokens=9, finish_reason="stop", versions=(1, 2))"""
    log_offline(tmp_path, [1, 2], {}, f"from asyncdapo.metrics.samples import Sample\nlog.log_samples([{sample}] * 2)")
    [table] = tmp_path.glob("wandb/offline-run-*/files/media/table/samples*.json")
    written = json.loads(table.read_text())
    assert written["columns"] == list(COLUMNS)
    row = [2, 7, "Q: 47*86", "[model]\n<b>\n[environment]\n4042", 1, 1, 2, 9, "stop", "1 to 2"]
    assert written["data"] == [row, row]


def test_an_online_run_says_its_address():
    assert describe("https://wandb.ai/me/asyncdapo/runs/1a2b3c4d", "wandb/run-1/files") == (
        "W&B: https://wandb.ai/me/asyncdapo/runs/1a2b3c4d"
    )


def test_a_resumed_run_keeps_its_id_also_with_other_settings(tmp_path: Path):
    log_offline(tmp_path, [0, 1], {"run": {"steps": 2}})
    log_offline(tmp_path, [2, 3], {"run": {"steps": 4}})
    records = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {record.name for record in records} == {f"run-{run_id(tmp_path)}.wandb"}
    assert all(b"reward/filtered_mean" in record.read_bytes() for record in records)


def test_each_run_directory_has_an_id_of_its_own(tmp_path: Path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    assert run_id(tmp_path / "one") == run_id(tmp_path / "one") != run_id(tmp_path / "other")
    (tmp_path / "one" / "wandb.id").write_text("")  # its writer died
    assert run_id(tmp_path / "one") == run_id(tmp_path / "one") != ""


def test_what_fails_in_the_background_is_raised_at_the_next_call(tmp_path: Path):
    (tmp_path / "file").write_text("")
    log = WandbLog(tmp_path, MetricsConfig(wandb_project="a/b"), "offline", "name", {})
    with pytest.raises(RunError, match="W&B: "):
        log.close()
    with pytest.raises(RunError, match="W&B: "):
        log.log({"step": 1})


class Unforeseen(Exception):  # noqa: N818
    """Nothing that W&B says it raises."""


def test_even_an_unforeseen_error_in_the_background_does_not_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import wandb

    def fail(**arguments: object) -> None:
        raise Unforeseen("a bug in a library")

    monkeypatch.setattr(wandb, "init", fail)
    log = WandbLog(tmp_path, MetricsConfig(), "offline", "name", {})
    with pytest.raises(RunError, match="W&B: a bug in a library") as caught:
        log.close()
    assert isinstance(caught.value.__cause__, Unforeseen)
