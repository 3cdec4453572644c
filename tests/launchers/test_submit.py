"""`launchers/submit.py`: what it refuses, and in the soak jobs on a real Ray cluster of one node.

The cluster needs the extra `cluster`; without it those tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from asyncdapo.controller.process.roster import read, survivors
from asyncdapo.metrics.jsonl import read_metrics
from tests.docs.blocks import ROOT

SMALL = ["metrics.wandb=disabled", "eval.num_prompts=32", "eval.num_greedy_prompts=16"]
needs_cluster = pytest.mark.skipif(
    importlib.util.find_spec("aiohttp") is None, reason="needs Ray's jobs: pip install -e '.[cluster]'"
)


def submit(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "submit.py"), *map(str, words)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_wrong_key_a_missing_directory_and_missing_data_are_one_line_each_and_exit_code_2(tmp_path: Path) -> None:
    for words, said in (
        (["quickstart", "run.step=2"], "did you mean run.steps?"),
        (["quickstart", "--dir", tmp_path / "nowhere"], "it has to be the same path on every node"),
        (["quickstart", "--runtime-env", "none.yaml", "--dir", tmp_path], "--runtime-env none.yaml: doesn't exist"),
        (["qwen2.5_0.5b_gsm8k_1gpu", "--dir", tmp_path], f"data/gsm8k/train.parquet isn't in {tmp_path}"),
    ):
        done = submit(*words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith("submit: ")
        assert said in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is not None, reason="the extra is installed")
def test_without_rays_jobs_it_says_what_to_install(tmp_path: Path) -> None:
    done = submit("quickstart", "--dir", tmp_path)
    assert done.returncode == 2
    assert "pip install -e '.[cluster]'" in done.stderr


@needs_cluster
def test_without_a_cluster_it_says_how_to_start_one(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    for words, variables in (([], {"RAY_ADDRESS": address}), (["--address", address], {})):
        done = submit("quickstart", "--dir", tmp_path, *words, **variables)
        assert done.returncode == 2
        assert f"no Ray dashboard answers at {address}: `ray start --head`" in done.stderr


@dataclass(frozen=True)
class Cluster:
    address: str
    variables: dict[str, str]

    def ray(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", *words],
            env={**os.environ, **self.variables, "RAY_ADDRESS": self.address},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head node on this machine that asks for a token, as new versions of Ray do; gone afterwards with all of it."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: names of sockets have little room
    (folder / "token").write_text(secrets.token_hex(32))
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "OMP_NUM_THREADS": "1"}
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = {name: free_port() for name in names}
    options = [f"--{name}={port}" for name, port in ports.items()]
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", *options]
        + [f"--temp-dir={folder / 'ray'}", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"],
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    one = Cluster(f"http://127.0.0.1:{ports['dashboard-port']}", variables)
    try:
        wait_until(lambda: "Traceback" not in one.ray("list"), 60)
        yield one
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)


def submitted(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("submitted "))


@needs_cluster
@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_job_trains_with_overrides_that_arrive_letter_for_letter(cluster: Cluster, tmp_path: Path) -> None:
    odd = 'run.dir=${run.name} "x" $HOME'
    where = ["--address", cluster.address, "--dir", tmp_path]
    job = submitted(submit("quickstart", "run.steps=2", odd, *SMALL, *where, **cluster.variables))
    log = cluster.ray("logs", "--follow", job)
    assert "step 2/2" in log, log
    assert [line["step"] for line in read_metrics(tmp_path / 'quickstart "x" $HOME')] == [0, 1, 2]
    assert "SUCCEEDED" in cluster.ray("status", job).upper()


@needs_cluster
@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_stopped_job_leaves_a_checkpoint_and_the_same_submission_resumes(cluster: Cluster, tmp_path: Path) -> None:
    words = ["quickstart", "run.steps=5", "run.dir=run", *SMALL, "--address", cluster.address, "--dir", tmp_path]
    job = submitted(submit(*words, **cluster.variables))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, 90)
    cluster.ray("stop", job)
    assert "the same command resumes from there" in (tmp_path / "run" / "run.log").read_text()
    assert len(read(tmp_path / "run")) > 4
    wait_until(lambda: not survivors(tmp_path / "run"), 10)
    again = submitted(submit(*words, **cluster.variables))
    log = cluster.ray("logs", "--follow", again)
    assert "step 5/5" in log, log


@needs_cluster
@pytest.mark.soak
def test_a_cluster_that_asks_for_a_token_is_named_as_such(cluster: Cluster, tmp_path: Path) -> None:
    done = submit("quickstart", "--dir", tmp_path, "--address", cluster.address, RAY_AUTH_MODE="disabled")
    assert done.returncode == 2
    assert "asks for its token" in done.stderr
