"""A run that is misused while it lives and after: everything is refused in a line, and no secret gets out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from asyncdapo.controller.process.reaper import descendants
from asyncdapo.controller.process.roster import is_running, read
from asyncdapo.learner.storage.checkpoint import checkpoint_dir, kept_steps
from asyncdapo.replay.ledger.audit import audit
from tests.controller.interruptions import SHORT, assert_nothing_lives, processes, survey, wait_for_batch
from tests.controller.runs import START_MODEL, command, copy_start_model, launch, started

RECORD_KEYS = """
import sys
if "asyncdapo.cli" in sys.orig_argv:
    import os, pathlib, zmq
    make = zmq.curve_keypair
    def make_and_tell():
        pair = make()
        with open(pathlib.Path(__file__).with_name("keys"), "ab") as file:
            file.write(pair[1] + b"\\n")
        return pair
    zmq.curve_keypair = make_and_tell
"""
"""A sitecustomize.py that makes the driver tell its secret keys."""


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_run_is_guarded_while_it_lives_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(RECORD_KEYS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with started(run_dir, *SHORT, "run.steps=100000") as process:
        wait_for_batch(run_dir, 8, process)
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        assert f"process {process.pid}" in refused(run_dir, "run.steps=100000")
        assert_all_roles_are_listed(run_dir)
        assert_no_secret_is_out(run_dir, process.pid, (tmp_path / "keys").read_bytes().split())
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
    assert_nothing_lives(run_dir)
    monkeypatch.delenv("PYTHONPATH")
    line = refused(run_dir, "run.seed=7", "rollout.group_size=8", "reward.incorrect=0", "loss.clip_high=0.3")
    assert all(key in line for key in ("run.seed", "rollout.group_size", "reward.incorrect", "loss.clip_high")), line
    other = copy_start_model(tmp_path / "other")
    (other / "tokenizer.json").write_text((START_MODEL / "tokenizer.json").read_text() + "\n")
    assert "model.path (other tokenizer.json)" in refused(run_dir, f"model.path={other}")
    assert_a_torn_checkpoint_is_named_and_the_one_before_used(run_dir)
    assert_a_broken_ledger_is_named(run_dir)


def refused(run_dir: Path, *overrides: str) -> str:
    """The one line with which a launch is refused."""
    words = command("launch", "quickstart", f"run.dir={run_dir}", *SHORT, "metrics.wandb=disabled", *overrides)
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.strip().splitlines()
    return line


def assert_all_roles_are_listed(run_dir: Path) -> None:
    words = command("ps", str(run_dir), "--json")
    rows = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert [row["role"] for row in rows] == ["controller", "replay", "rollout", "scorer", "learner"]
    assert {row["state"] for row in rows} == {"running"}
    assert all(is_running(entry) for entry in read(run_dir))
    titles = {role: Path(f"/proc/{processes(run_dir, role)[0]}/cmdline").read_text() for role in ("replay", "learner")}
    assert "ReplayActor" in titles["replay"]
    assert "LearnerActor" in titles["learner"]


def assert_no_secret_is_out(run_dir: Path, driver: int, secrets: list[bytes]) -> None:
    """Neither in a file of the run, nor in a command line or environment of its processes."""
    assert len(secrets) == 2
    assert all(len(secret) == 40 for secret in secrets)
    pids = {driver} | {process.pid for process in descendants(driver)}
    places = [path for path in run_dir.rglob("*") if path.is_file()]
    places += [Path(f"/proc/{pid}/{name}") for pid in pids for name in ("cmdline", "environ")]
    for place in places:
        if place.exists():
            content = place.read_bytes()
            assert not any(secret in content for secret in secrets), place


def assert_a_torn_checkpoint_is_named_and_the_one_before_used(run_dir: Path) -> None:
    before, newest = kept_steps(run_dir)[-2:]
    os.truncate(checkpoint_dir(run_dir, newest) / "model.safetensors", 1000)
    run = launch(run_dir, *SHORT, f"run.steps={newest + 1}")
    assert run.exit_code == 0, run.output
    assert f"not used: step-{newest:06d}: model.safetensors has 1,000 bytes" in run.output
    assert f"resumes after step {before}, from checkpoints/step-{before:06d}" in run.output
    assert [line["step"] for line in run.lines] == list(range(newest + 2))
    assert survey(run_dir).checkpoint == newest + 1
    assert audit(run_dir) == []


def assert_a_broken_ledger_is_named(run_dir: Path) -> None:
    broken = shutil.copytree(run_dir, run_dir.with_name("broken"))
    (broken / "ledger.db").write_bytes(b"garbage" * 10_000)
    assert f"{broken / 'ledger.db'}: can't be resumed" in refused(broken, "run.steps=100000")
