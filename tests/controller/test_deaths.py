"""One run with a learner of two ranks, among strangers: nobody hears it, and what they send costs nothing. Then its
processes are killed one after the other: the run continues, and every prompt ends exactly once. Asked to stop it stops,
and the same command resumes it with one rank, until a process has died too often. All tests share the run."""

from __future__ import annotations

import os
import re
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
    Interruption,
    assert_nothing_lives,
    assert_resumed,
    num_lives_trained_on,
    processes,
    query,
    stop,
    survey,
    trained_steps,
    wait_for_batch,
    wait_until,
)
from tests.controller.process.test_ray_servers import LEARNER_OF_TWO, pid_of
from tests.controller.runs import FinishedRun, started
from tests.ports import Port, listening, strangers

pytestmark = pytest.mark.timeout(700)

COMMAND = (*SHORT, "learner.updates_per_step=2", "run.steps=100000")
SHARDED = (*LEARNER_OF_TWO, "learner.shards=2")
EACH_ONCE = ("controller.max_restarts=1", "rollout.parity_every=1")
"""Deaths fall into comparisons of log-probs, too."""
NONE_EVER = "controller.max_restarts=0"
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
class Strangers:
    """What they found, and what they cost."""

    ports: list[Port]
    knocked: str
    """What the GCS said to one."""
    socket_modes: list[int]
    """Permissions of the directories above Ray's sockets, which know no token."""
    grown_bytes: dict[psutil.Process, int]
    """Memory that each process gained while they sent garbage to every port."""


@dataclass(frozen=True)
class Seen:
    """What was seen of the run while it lived, and what it left behind."""

    strangers: Strangers
    lost: set[int]
    """Prompts of the leases that the worker held at its first death."""
    stopped: str
    """What the first launch printed, until it was asked to stop."""
    between: Interruption
    run: FinishedRun
    """After the second launch."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    run_dir = tmp_path_factory.mktemp("deaths") / "run"
    with started(run_dir, *COMMAND, *SHARDED, *EACH_ONCE) as process:

        def kill(role: str) -> None:
            """Kill the last process of a role, and see the run continue with others in the place of all of them."""
            wait_until(lambda: processes(run_dir, role), process)  # a scorer is listed by its worker's first heartbeat
            pids, step = processes(run_dir, role), trained_steps(run_dir)
            os.kill(pids[-1], signal.SIGKILL)
            wait_until(lambda: len(set(processes(run_dir, role)) - set(pids)) == len(pids), process)
            wait_for_batch(run_dir, step + 2, process)

        wait_for_batch(run_dir, 1, process)
        found = among_strangers(run_dir, process)
        stop_while_it_holds_a_lease(run_dir, *processes(run_dir, "rollout"))
        kill("rollout")
        wait_until(lambda: num_lives_trained_on(run_dir) > 1, process)
        lost = {prompt for (prompt,) in query(run_dir, "SELECT prompt_id FROM leases WHERE outcome = 'lost'")}
        for role in ("scorer", "replay", "learner"):
            kill(role)
        stopped = stop(process, signal.SIGTERM)
    between = survey(run_dir)
    assert_nothing_lives(run_dir)
    with started(run_dir, *COMMAND, NONE_EVER) as process:
        wait_for_batch(run_dir, between.checkpoint + 2, process)
        os.kill(*processes(run_dir, "rollout"), signal.SIGKILL)
        output, _ = process.communicate(timeout=180)
    return Seen(found, lost, stopped, between, FinishedRun(run_dir, process.returncode, output))


def among_strangers(run_dir: Path, process: subprocess.Popen[str]) -> Strangers:
    """Two steps of the run."""
    known = {psutil.Process(process.pid), *descendants(process.pid)}
    ports, gcs = listening(one.pid for one in known), pid_of("gcs_server", process.pid)
    knocked = knock(next(port.number for port in ports if port.pid == gcs))
    modes = socket_modes(pid_of("raylet", process.pid))
    before = {one: one.memory_info().rss for one in known if is_alive(one)}
    with strangers((port.number for port in ports), rounds=3):
        wait_for_batch(run_dir, trained_steps(run_dir) + 2, process)
    grown = {one: one.memory_info().rss - rss for one, rss in before.items() if is_alive(one)}
    return Strangers(ports, knocked, modes, grown)


def knock(port: int) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": "/nowhere"}
    words = [sys.executable, "-c", KNOCK, f"127.0.0.1:{port}"]
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=60, check=False).stdout.strip()


def socket_modes(raylet: int) -> list[int]:
    words = Path(f"/proc/{raylet}/cmdline").read_text().split("\0")
    (path,) = [Path(word.partition("=")[2]) for word in words if word.startswith("--store_socket_name=")]
    assert path.exists()
    return [parent.stat().st_mode & 0o777 for parent in path.parents[:4]]


def stop_while_it_holds_a_lease(run_dir: Path, worker: int) -> None:
    """So that the kill that follows finds it in the middle of one, and not idle between two batches."""
    while True:
        os.kill(worker, signal.SIGSTOP)
        time.sleep(0.3)  # what it has sent is in the ledger by then
        if query(run_dir, "SELECT 1 FROM leases WHERE outcome IS NULL LIMIT 1"):
            return
        os.kill(worker, signal.SIGCONT)
        time.sleep(0.1)


def test_strangers_reach_no_port_from_outside(seen: Seen) -> None:
    assert len(seen.strangers.ports) > 5
    assert [port for port in seen.strangers.ports if not port.on_loopback] == []


def test_those_on_this_machine_are_refused_by_ray_and_do_not_get_at_its_sockets(seen: Seen) -> None:
    assert seen.strangers.knocked == "refused"
    assert 0o700 in seen.strangers.socket_modes


def test_their_garbage_at_every_port_costs_nothing(seen: Seen) -> None:
    assert len(seen.strangers.grown_bytes) > 5
    assert max(seen.strangers.grown_bytes.values()) < 100 << 20, seen.strangers.grown_bytes


def test_what_a_killed_worker_held_is_sampled_again_and_ends_once(seen: Seen) -> None:
    assert seen.lost, "the worker held leases when it died"
    again = query(seen.run.dir, "SELECT prompt_id FROM leases WHERE attempt = 2 AND outcome = 'done'")
    ended = query(seen.run.dir, "SELECT prompt_id FROM prompts WHERE state IN ('trained', 'filtered')")
    assert {prompt for (prompt,) in again} & {prompt for (prompt,) in ended} & seen.lost
    assert audit(seen.run.dir) == []


def test_both_ranks_are_started_again_from_the_checkpoint_after_the_death_of_one(seen: Seen) -> None:
    run_dir = seen.run.dir
    assert re.search(r"learner(-1)?: the process died", (run_dir / "run.log").read_text())  # whichever ended first
    assert (run_dir / "logs" / "learner-1.log").exists()
    assert query(run_dir, "SELECT branch FROM branches ORDER BY branch") == [(0,), (1,), (2,)]  # by it, by the resume
    steps = [line["step"] for line in seen.run.lines]
    assert steps == list(range(len(steps)))


def test_asked_to_stop_it_finishes_its_step_and_the_same_command_resumes_behind_it(seen: Seen) -> None:
    last = seen.between.checkpoint
    assert last == max(seen.between.trained)
    assert f"stopped after step {last}: the same command resumes from there" in seen.stopped
    assert_resumed(seen.run, seen.between)


def test_a_process_that_dies_too_often_ends_the_run_with_the_cause_in_its_last_line(seen: Seen) -> None:
    assert seen.run.exit_code == 1, seen.run.output
    cause = r"rollout-0: the process died.*controller.max_restarts is 0"
    assert re.search(cause, seen.run.output.splitlines()[-1]), seen.run.output
