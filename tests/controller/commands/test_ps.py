"""`asyncdapo ps` as a user types it: of a run that lives, one that is over, and one that never was."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asyncdapo.controller.commands.ps import comings_and_goings
from asyncdapo.controller.process.roster import Entry, Roster, entry_of
from asyncdapo.replay.ledger.schema import TABLES
from tests.controller.living import eventually, living
from tests.controller.runs import command


def ps(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("ps", *map(str, args)), capture_output=True, text=True, check=False)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    result = ps(run_dir, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


def listed(run_dir: Path, *entries: Entry) -> None:
    Roster(run_dir).set("test", entries)


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    """A ledger without rows; call it with a table and columns to insert one, the other columns are 0."""
    db = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    db.executescript(f"PRAGMA journal_mode = WAL; {TABLES}")

    def insert(table: str, **values: object) -> None:
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})") if row[5] == 0]
        marks = ", ".join("?" * len(columns))
        row = [values.get(column, 0) for column in columns]
        db.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", row)

    yield insert
    db.close()


def test_a_process_that_lives_is_shown_with_state_age_and_memory(tmp_path: Path) -> None:
    with living() as process:
        listed(tmp_path, entry_of("scorer", 2, process.pid))
        (row,) = rows(tmp_path)
        assert (row["role"], row["index"], row["pid"], row["state"]) == ("scorer", 2, process.pid, "running")
        assert 0 <= row["age_s"] < 60
        assert 1 < row["memory_mib"] < 500
        assert row["lag"] is None


def test_every_state_has_its_word(tmp_path: Path) -> None:
    with living() as running, living() as stopped, living() as zombie, living() as over:
        processes = (running, stopped, zombie, over)
        entries = [entry_of("rollout", index, process.pid) for index, process in enumerate(processes)]
        reused = replace(entries[0], index=4, started=entries[0].started - 60)
        listed(tmp_path, *entries, reused, replace(entries[0], index=5, host="elsewhere"))
        stopped.send_signal(signal.SIGSTOP)
        zombie.kill()
        over.kill()
        over.wait()
        words = ["running", "stopped", "zombie", "gone", "gone", "other host"]
        assert eventually(lambda: [row["state"] for row in rows(tmp_path)] == words)
        by_word = {row["state"]: row for row in rows(tmp_path)}
        assert by_word["gone"]["memory_mib"] is by_word["gone"]["age_s"] is None


def test_lag_is_versions_of_a_worker_groups_in_replay_and_steps_of_the_learner(tmp_path: Path, ledger: Any) -> None:
    roles = [("replay", 0), ("rollout", 0), ("rollout", 1), ("rollout", 2), ("learner", 0)]
    listed(tmp_path, *(Entry(role=role, index=index, pid=2**22 + 1, host="h", started=1.5) for role, index in roles))
    for version in range(1, 6):
        ledger("publishes", version=version, pos=version)
        ledger("loads", worker=0, version=version, pos=version)
    ledger("loads", worker=1, version=4, pos=4)
    ledger("loads", worker=1, version=2, pos=9)  # restarted: what came last counts, not what is highest
    for step in range(1, 8):
        ledger("batches", step=step)
    for state in ("queued", "queued", "cut", "trained"):
        ledger("groups", state=state)
    for name in ("step-000000", "step-000004", ".step-000006.new"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)

    lags = [(row["role"], row["index"], row["lag"], row["lag_unit"]) for row in rows(tmp_path)]
    assert lags == [
        ("replay", 0, 2, "groups"),
        ("rollout", 0, 0, "versions"),
        ("rollout", 1, 3, "versions"),
        ("rollout", 2, None, None),  # has not joined
        ("learner", 0, 3, "steps"),
    ]


def test_the_table_holds_every_process_on_a_narrow_terminal(tmp_path: Path) -> None:
    with living() as process:
        long_host = replace(entry_of("learner", 0, process.pid), host="a-very-long-name-of-a-node." * 4)
        listed(tmp_path, entry_of("rollout", 11, process.pid), long_host)
        result = ps(tmp_path)
    assert result.returncode == 0
    heading, *lines = result.stdout.splitlines()
    assert heading.split() == ["role", "index", "pid", "host", "started", "state", "lag", "memory"]
    assert lines[0].split()[:3] == ["rollout", "11", str(process.pid)]
    assert "running" in lines[0]
    assert "MiB" in lines[0]
    assert "learner" in result.stdout
    assert "other host" in result.stdout
    assert all(len(line) <= 80 for line in lines)


def test_a_ledger_that_cant_be_read_is_said_and_hides_no_process(tmp_path: Path) -> None:
    listed(tmp_path, Entry(role="learner", index=0, pid=2**22 + 1, host="h", started=1.5))
    (tmp_path / "ledger.db").write_bytes(b"not a database, though long enough for SQLite to look at" * 20)
    result = ps(tmp_path, "--json")
    assert result.returncode == 0
    assert "ledger.db: file is not a database: lag is unknown" in result.stderr
    assert [row["role"] for row in json.loads(result.stdout)] == ["learner"]


def test_a_directory_without_a_run_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for run_dir in (tmp_path, tmp_path / "missing"):
        result = ps(run_dir)
        assert result.returncode == 2
        (line,) = result.stderr.strip().splitlines()
        assert "processes.json is missing: no run was started there" in line


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    listed(tmp_path, Entry(role="learner", index=0, pid=2**22 + 1, host="h", started=1.5))
    code = (
        "import sys\n"
        "from asyncdapo.cli import main\n"
        f"assert main(['ps', {str(tmp_path)!r}]) == 0\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([command()[0], "-c", code], check=True, capture_output=True)


def test_workers_that_came_and_went_are_said_once_one_has_gone(tmp_path: Path, ledger: Any) -> None:
    events = [("joined", 0, "5f9d63d5"), ("joined", 1, "8e21"), ("lost", 0, "killed"), ("drained", 1, "scaled to 1")]
    for number, (kind, worker, detail) in enumerate(events):
        ledger("events", event_id=number, kind=f"worker_{kind}", worker=worker, detail=detail, at_s=1e9)
        assert number > 1 or comings_and_goings(tmp_path) == []
    said = ["rollout 0 joined", "rollout 1 joined", "rollout 0 died: killed", "rollout 1 left: scaled to 1"]
    assert [line[16:] for line in comings_and_goings(tmp_path)] == said
