"""One run with a learner of two ranks, among strangers: nobody hears it, and what they send costs nothing. Then one of
its ranks is killed, and at last Ray's GCS. All tests share the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from asyncdapo.controller.process.reaper import descendants, is_alive
from asyncdapo.replay.ledger.audit import audit
from tests.controller.interruptions import (
    SHORT,
    assert_nothing_lives,
    last_trained_at_s,
    processes,
    query,
    wait_for_batch,
    wait_until,
)
from tests.controller.process.test_ray_servers import LEARNER_OF_TWO, assert_ended_in_a_line, pid_of
from tests.controller.runs import FinishedRun, started
from tests.ports import Port, listening, strangers

pytestmark = pytest.mark.timeout(500)

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


@dataclass(frozen=True)
class Seen:
    """What was seen of the run while it lived, and what it left behind."""

    run: FinishedRun
    ports: list[Port]
    knocked: str
    """What the GCS said to a stranger."""
    socket_modes: list[int]
    """Permissions of the directories above Ray's sockets, which know no token."""
    grown_bytes: dict[psutil.Process, int]
    """Memory that each process gained while strangers sent garbage to every port."""
    ranks: list[int]
    """Pids of the learner when one of them was killed."""
    next_ranks: list[int]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    run_dir = tmp_path_factory.mktemp("two_ranks") / "run"
    two = (*LEARNER_OF_TWO, "learner.shards=2", "learner.updates_per_step=2")
    with started(run_dir, *SHORT, *two, "run.steps=100000") as process:
        wait_for_batch(run_dir, 1, process)
        known = {psutil.Process(process.pid), *descendants(process.pid)}
        ports, gcs = listening(one.pid for one in known), pid_of("gcs_server", process.pid)
        knocked = knock(next(port.number for port in ports if port.pid == gcs))
        modes = socket_modes(pid_of("raylet", process.pid))
        before = {one: one.memory_info().rss for one in known if is_alive(one)}
        with strangers((port.number for port in ports), rounds=3):
            wait_for_batch(run_dir, 4, process)
        grown = {one: one.memory_info().rss - rss for one, rss in before.items() if is_alive(one)}
        ranks = processes(run_dir, "learner")
        os.kill(ranks[1], signal.SIGKILL)
        wait_until(lambda: len(set(processes(run_dir, "learner")) - set(ranks)) == 2, process)
        replaced_at_s = time.time()
        wait_until(lambda: last_trained_at_s(run_dir) > replaced_at_s, process)
        next_ranks = processes(run_dir, "learner")
        os.kill(gcs, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    return Seen(FinishedRun(run_dir, process.returncode, output), ports, knocked, modes, grown, ranks, next_ranks)


def knock(port: int) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": "/nowhere"}
    words = [sys.executable, "-c", KNOCK, f"127.0.0.1:{port}"]
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=60, check=False).stdout.strip()


def socket_modes(raylet: int) -> list[int]:
    words = Path(f"/proc/{raylet}/cmdline").read_text().split("\0")
    (path,) = [Path(word.partition("=")[2]) for word in words if word.startswith("--store_socket_name=")]
    assert path.exists()
    return [parent.stat().st_mode & 0o777 for parent in path.parents[:4]]


def test_strangers_reach_no_port_from_outside(seen: Seen) -> None:
    assert len(seen.ports) > 5
    assert [port for port in seen.ports if not port.on_loopback] == []


def test_those_on_this_machine_are_refused_by_ray_and_do_not_get_at_its_sockets(seen: Seen) -> None:
    assert seen.knocked == "refused"
    assert 0o700 in seen.socket_modes


def test_their_garbage_at_every_port_costs_nothing(seen: Seen) -> None:
    assert len(seen.grown_bytes) > 5
    assert max(seen.grown_bytes.values()) < 100 << 20, seen.grown_bytes


def test_both_ranks_are_started_again_after_the_death_of_one_and_training_continues(seen: Seen) -> None:
    assert len(seen.ranks) == len(seen.next_ranks) == 2
    assert not set(seen.ranks) & set(seen.next_ranks)
    run_dir = seen.run.dir
    assert "learner-1: the process died" in (run_dir / "run.log").read_text()
    assert (run_dir / "logs" / "learner-1.log").exists()
    assert query(run_dir, "SELECT branch FROM branches ORDER BY branch") == [(0,), (1,)]
    steps = [line["step"] for line in seen.run.lines]
    assert steps == list(range(len(steps)))


def test_a_killed_gcs_ends_the_run_in_a_line_and_leaves_sound_files(seen: Seen) -> None:
    assert_ended_in_a_line(seen.run, "gcs_server")
    assert audit(seen.run.dir) == []
    assert_nothing_lives(seen.run.dir)
