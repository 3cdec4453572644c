"""A real run among strangers: nobody else hears it, what they send costs nothing, and the death of Ray has a name."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from asyncdapo.controller.process.reaper import descendants, is_alive
from tests.controller.interruptions import SHORT, assert_nothing_lives, wait_for_batch
from tests.controller.runs import FinishedRun, launch, started
from tests.ports import listening, strangers

KNOCK = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    print("refused")
"""
"""A stranger on this machine asks the GCS, without the token."""

LEARNER_OF_TWO = ("learner.ranks=2", "learner.threads=1")
ENDLESS = "run.steps=100000"


def pid_of(server: str, driver: int) -> int:
    return next(process.pid for process in descendants(driver) if process.name() == server)


def gone_on_after(run_dir: Path, step: int) -> FinishedRun:
    run = launch(run_dir, *SHORT, *LEARNER_OF_TWO, f"run.steps={step}")
    assert run.exit_code == 0, run.output
    assert "resumes after step" in run.output
    return run


@pytest.mark.timeout(400)
def test_strangers_reach_no_port_from_outside_and_cost_nothing_inside_and_a_killed_gcs_ends_the_run_in_a_line(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, *SHORT, *LEARNER_OF_TWO, ENDLESS) as process:
        wait_for_batch(run_dir, 1, process)
        known = {psutil.Process(process.pid), *descendants(process.pid)}
        ports = listening(one.pid for one in known)
        assert [port for port in ports if not port.on_loopback] == []
        gcs = pid_of("gcs_server", process.pid)
        assert_only_the_user_may_enter(pid_of("raylet", process.pid))
        assert knock(next(port.number for port in ports if port.pid == gcs)) == "refused"
        before = {one: one.memory_info().rss for one in known if is_alive(one)}
        with strangers((port.number for port in ports), rounds=3):
            wait_for_batch(run_dir, 4, process)
        grown = {one: one.memory_info().rss - rss for one, rss in before.items() if is_alive(one)}
        assert max(grown.values()) < 100 << 20, grown
        assert_dies_in_a_line(process, "gcs_server", run_dir)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
def test_the_run_resumes_after_a_server_of_ray_was_killed(server: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, *SHORT, *LEARNER_OF_TWO, ENDLESS) as process:
        wait_for_batch(run_dir, 8, process)
        assert_dies_in_a_line(process, server, run_dir)
    gone_on_after(run_dir, 14)


def assert_dies_in_a_line(process: subprocess.Popen[str], server: str, run_dir: Path) -> None:
    os.kill(pid_of(server, process.pid), signal.SIGKILL)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert time.monotonic() - began < 60
    cause = f"the run ended: Ray's process {server} died; the same command resumes from the last checkpoint"
    *before, said, last = output.splitlines()
    assert said.endswith(cause)
    assert last == f"asyncdapo: {cause}"
    assert not [line for line in before if "gcs" in line.lower() or "raylet" in line.lower()], output
    assert_nothing_lives(run_dir)


def assert_only_the_user_may_enter(raylet: int) -> None:
    """Sockets of Ray's that know no token are in a directory that is closed to others."""
    words = Path(f"/proc/{raylet}/cmdline").read_text().split("\0")
    (path,) = [Path(word.partition("=")[2]) for word in words if word.startswith("--store_socket_name=")]
    assert path.exists()
    modes = [stat.S_IMODE(parent.stat().st_mode) for parent in path.parents[:4]]
    assert 0o700 in modes, modes


def knock(port: int) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": "/nowhere"}
    words = [sys.executable, "-c", KNOCK, f"127.0.0.1:{port}"]
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=60, check=False).stdout.strip()
