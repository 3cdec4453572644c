"""Whole runs over two nodes, and nodes that are gone in the middle. Two raylets on this machine stand in for them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from asyncdapo.controller.process.roster import read
from asyncdapo.replay.ledger.audit import audit
from tests.controller.nodes import node_of, nodes
from tests.controller.runs import command, started, wait_for_step

pytestmark = [pytest.mark.soak, pytest.mark.timeout(400)]
OFTEN = "learner.checkpoint_every=2"


def until(true: Callable[[], object], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


def homes(run_dir: Path) -> dict[str, str]:
    """The node of each process that lives, by its name; the controller is on the head."""
    found = {}
    for entry in read(run_dir):
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(entry.pid).status() != psutil.STATUS_ZOMBIE and entry.role != "controller":
                found[entry.name] = node_of(entry.host)
    return found


def steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_run_spans_two_nodes_and_outlives_the_loss_of_one(tmp_path: Path) -> None:
    """First of the node that has only workers, which another one replaces; then of that of replay and learner."""
    run_dir = tmp_path / "run"
    with nodes("node-a", "node-b", head_cpus=0) as cluster:
        keys = (f"controller.ray_address={cluster.address}", "run.steps=400", "rollout.num_workers={min: 2, max: 4}")
        with started(run_dir, *keys, OFTEN) as process:
            wait_for_step(run_dir, 2, process)
            until(lambda: "rollout-3" in homes(run_dir))
            before = homes(run_dir)
            assert set(before.values()) == {"node-a", "node-b"}
            listed = json.loads(subprocess.check_output(command("ps", str(run_dir), "--json"), text=True))
            hosts = {row["role"] + str(row["index"]): node_of(row["host"]) for row in listed}
            assert hosts["replay0"] == before["replay"]
            assert {row["state"] for row in listed} == {"running", "other host"}
            logs = {path.stem for path in (run_dir / "logs").iterdir()}
            assert logs >= {name for name in before if not name.startswith("scorer")}

            main, other = before["replay"], ({"node-a", "node-b"} - {before["replay"]}).pop()
            assert before["learner"] == main, "the run's own processes are on as few nodes as Ray can"
            cluster.cut_power(other)
            done = steps(run_dir)
            until(lambda: steps(run_dir) > done + 3)
            until(lambda: set(homes(run_dir).values()) == {main} and "rollout-1" in homes(run_dir))
            cluster.add("node-c")

            cluster.cut_power(main)
            until(lambda: homes(run_dir).get("learner") == homes(run_dir).get("replay") == "node-c")
            done = steps(run_dir)
            until(lambda: steps(run_dir) > done + 3)
            said = (run_dir / "run.log").read_text()
            lost = [name for name, node in before.items() if node == other and name.startswith("rollout")]
            assert any(f"{name}: the process died" in said for name in lost)
            assert f"/{other})" in said
            assert "has left the Ray cluster, and all that lived there" in said
            assert "replay has moved to another node" in said

            cluster.cut_power("node-c")
            assert process.wait(120) == 1
        last = process.stdout.read().strip().splitlines()[-1]
        assert "has lost its node, and Ray has no room for it (0.1 CPU and 0 GPU)" in last
        assert audit(run_dir) == []

        cluster.add("node-d")
        with started(run_dir, *keys, OFTEN) as process:
            reached = steps(run_dir)
            wait_for_step(run_dir, reached + 2, process)
            assert set(homes(run_dir).values()) == {"node-d"}
            process.send_signal(2)
            assert process.wait(60) == 130
    assert audit(run_dir) == []
    assert "resumes after step" in (run_dir / "run.log").read_text()
