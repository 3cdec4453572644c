"""Runs with environments of every shape: three steps, and an audit. Servers and packages are the real ones.

`ENVIRONMENT_PYTHON` names the interpreter of a virtual environment that has the packages; otherwise it is this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from asyncdapo.metrics.jsonl import read_metrics
from tests.controller.runs import command, launch
from tests.environment.chat_model import keys, save_chat_model
from tests.environment.hosting import SHAPES

PYTHON = os.environ.get("ENVIRONMENT_PYTHON", sys.executable)
pytestmark = [pytest.mark.soak, pytest.mark.timeout(360)]


def needs(package: str) -> None:
    if subprocess.run([PYTHON, "-c", f"import {package}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{PYTHON} has no {package}")


def train(folder: Path, *overrides: str) -> list[dict[str, float]]:
    """The metrics of each step."""
    run = launch(folder / "run", *keys(save_chat_model(folder / "model")), *overrides)
    assert run.exit_code == 0, run.output
    audit = subprocess.run(command("audit", str(folder / "run")), capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    lines = [line for line in read_metrics(folder / "run") if line["step"]]
    assert [line["step"] for line in lines] == [1, 2, 3]
    return lines


@pytest.mark.parametrize("name", ["Workshop", "Counter", "Guess"])
def test_a_class_of_each_shape_trains(name: str, tmp_path: Path) -> None:
    lines = train(tmp_path, f"environment.path={SHAPES}:{name}")
    assert all(line["learner/grad_norm"] >= 0 for line in lines)


def test_an_environment_of_skyrls_own_trains(tmp_path: Path) -> None:
    needs("skyrl_gym")
    train(tmp_path, "environment.path=skyrl_gym.envs.gsm8k.env:GSM8kEnv", f"environment.python={PYTHON}")


OPENENV_SERVER = """
import sys
import uvicorn
from openenv.core.env_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

class Said(Action):
    message: str

class Heard(Observation):
    text: str = ""

class Echo(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, answer="", **row):
        self.answer, self.num_heard = answer, 0
        return Heard(text=f"go {seed}")

    def step(self, action, timeout_s=None, **more):
        self.num_heard += 1
        even = float(len(action.message) % 2)
        return Heard(text=f"you said {action.message}", reward=even, done=self.num_heard == 2)

    @property
    def state(self):
        return State(episode_id="one", step_count=self.num_heard)

app = create_app(Echo, Said, Heard, env_name="echo", max_concurrent_envs=1024)
server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
config = server.config
config.load()
socket = config.bind_socket()
print(socket.getsockname()[1], flush=True)
server.run(sockets=[socket])
"""


@contextmanager
def openenv_server(log: Path) -> Iterator[str]:
    with (
        log.open("w") as errors,
        subprocess.Popen([PYTHON, "-c", OPENENV_SERVER], stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


def test_a_real_server_of_openenv_trains(tmp_path: Path) -> None:
    needs("openenv")
    with openenv_server(tmp_path / "server.log") as url:
        lines = train(tmp_path, f"environment.path=openenv:{url}")
    assert all(line["learner/grad_norm"] >= 0 for line in lines)


def test_a_taskset_of_verifiers_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("verifiers")
    monkeypatch.setenv("PYTHONPATH", str(SHAPES.parent))
    rows = subprocess.run(
        [PYTHON, str(SHAPES.parents[2] / "examples" / "taskset_rows.py"), "verifiers_echo", "num=200"],
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
