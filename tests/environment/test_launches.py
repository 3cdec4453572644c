"""Runs with environments of every shape: three steps, and an audit. Servers and packages are the real ones.

`ENVIRONMENT_PYTHON` names the interpreter of a virtual environment that has the packages; otherwise it is this one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from asyncdapo.metrics.jsonl import read_metrics
from tests.controller.runs import FinishedRun, command, launch
from tests.environment.chat_model import keys, save_chat_model
from tests.environment.hosting import SHAPES

PYTHON = os.environ.get("ENVIRONMENT_PYTHON", sys.executable)
EXAMPLES = SHAPES.parents[2] / "examples"
COUNTER, GUESS = EXAMPLES / "counter.py", EXAMPLES / "guess.py"
pytestmark = [pytest.mark.soak, pytest.mark.timeout(360)]


def needs(package: str) -> None:
    if subprocess.run([PYTHON, "-c", f"import {package}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{PYTHON} has no {package}")


def train(folder: Path, *overrides: str) -> list[dict[str, float]]:
    """The metrics of each step of a run with a small chat model."""
    return trained(launch(folder / "run", *keys(save_chat_model(folder / "model")), *overrides))


def trained(run: FinishedRun) -> list[dict[str, float]]:
    assert run.exit_code == 0, run.output
    audit = subprocess.run(command("audit", str(run.dir)), capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    lines = [line for line in read_metrics(run.dir) if line["step"]]
    assert [line["step"] for line in lines] == [1, 2, 3]
    return lines


@pytest.mark.parametrize("path", [f"{SHAPES}:Workshop", f"{COUNTER}:Counter", f"{GUESS}:Guess"])
def test_a_class_of_each_shape_trains(path: str, tmp_path: Path) -> None:
    lines = train(tmp_path, f"environment.path={path}")
    assert all(line["learner/grad_norm"] >= 0 for line in lines)


def test_an_environment_of_skyrls_own_trains(tmp_path: Path) -> None:
    needs("skyrl_gym")
    train(tmp_path, "environment.path=skyrl_gym.envs.gsm8k.env:GSM8kEnv", f"environment.python={PYTHON}")


@contextmanager
def openenv_server(log: Path) -> Iterator[str]:
    """Its address, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url, command_line = f"http://127.0.0.1:{port}", [PYTHON, str(EXAMPLES / "openenv_server.py"), str(port)]
    with log.open("w") as output, subprocess.Popen(command_line, stdout=output, stderr=output) as server:
        try:
            while True:
                assert server.poll() is None, log.read_text()
                with suppress(URLError), urlopen(f"{url}/schema"):
                    break
                time.sleep(0.2)
            yield url
        finally:
            server.kill()


def test_a_real_server_of_openenv_trains(tmp_path: Path) -> None:
    needs("openenv")
    with openenv_server(tmp_path / "server.log") as url:
        own = (f"environment.path=openenv:{url}", "run.steps=3")
        lines = trained(launch(tmp_path / "run", *own, config="quickstart_tools"))
    assert all(line["rollout/turns_mean"] > 1 for line in lines)


def test_a_taskset_of_verifiers_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("verifiers")
    monkeypatch.setenv("PYTHONPATH", str(SHAPES.parent))
    rows = subprocess.run(
        [PYTHON, str(EXAMPLES / "taskset_rows.py"), "verifiers_echo", "num=200"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (tmp_path / "tasks.jsonl").write_text(rows)
    train(
        tmp_path,
        "environment.path=verifiers:verifiers_echo?renderer.name=qwen3",
        f"environment.python={PYTHON}",
        "prompts.task=file",
        f"prompts.path={tmp_path / 'tasks.jsonl'}",
    )
