"""What a launch needs of the machine is asked for in one line, before anything starts."""

from __future__ import annotations

import resource
import subprocess
import tempfile
from pathlib import Path

import pytest

from asyncdapo.config.config import Config
from asyncdapo.controller.process.surroundings import LONGEST_PARENT, check_surroundings, ray_parent
from asyncdapo.errors import UserError
from asyncdapo.model.config import ModelConfig
from tests.controller.runs import command

CONFIG = Config(model=ModelConfig(path="none"))


@pytest.mark.parametrize(
    ("before", "line"),
    [
        ("HOME=/proc/nowhere", "HOME: can't be used (No such file or directory), got '/proc/nowhere'"),
        (
            "HOME=/proc",
            "HOME: can't be used (No such file or directory), got '/proc' (set HOME to a directory of yours)",
        ),
        ("TMPDIR=/proc/nowhere", "TMPDIR: can't be used (No such file or directory), got '/proc/nowhere'"),
        ("ulimit -n 256;", "ulimit -n: a process may have 256 files open, and this run needs up to "),
    ],
)
def test_a_launch_says_in_one_line_what_to_set(before: str, line: str, tmp_path: Path) -> None:
    words = command("launch", "quickstart", f"run.dir={tmp_path / 'run'}")
    result = subprocess.run(
        ["bash", "-c", f'{before} "$@"', "bash", *words], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2, result.stdout + result.stderr
    (said,) = result.stderr.splitlines()
    assert said.startswith(f"asyncdapo: {line}")
    assert not (tmp_path / "run").exists()


def test_the_soft_limit_of_open_files_is_raised_as_far_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 20_000))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: raised.append(limits))
    check_surroundings(CONFIG)
    assert raised == [(20_000, 20_000)]


def test_a_path_too_long_for_a_socket_gives_way_to_tmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * LONGEST_PARENT)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    assert ray_parent() == Path("/tmp")
    monkeypatch.setattr("asyncdapo.controller.process.surroundings.LONGEST_PARENT", 3)
    with pytest.raises(UserError, match="TMPDIR: is too long for the sockets of Ray, which may have 3 bytes"):
        ray_parent()
    monkeypatch.delenv("TMPDIR")
    monkeypatch.undo()
    assert ray_parent() == Path(tempfile.gettempdir())
