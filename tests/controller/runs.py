"""Whole runs for the tests: the real command in a process of its own, small enough for a few seconds of training."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from asyncdapo.config.config import Config
from asyncdapo.controller.checks.preflight import prepare_run
from asyncdapo.controller.checks.resume import Resume
from asyncdapo.metrics.jsonl import read_metrics

START_MODEL = Path(__file__).resolve().parents[2] / "configs" / "models" / "chain_start"

SMALL = ("eval.num_prompts=32", "eval.num_greedy_prompts=16", "metrics.wandb=disabled", "learner.checkpoint_every=100")
"""Overrides that keep a run short."""


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "asyncdapo.cli", *args]


@dataclass(frozen=True)
class FinishedRun:
    """What a run left behind."""

    dir: Path
    exit_code: int
    output: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.dir)


def prepare(run_dir: Path, *overrides: str) -> tuple[Config, Resume]:
    """A launch that gets as far as its first process."""
    with prepare_run("quickstart", [f"run.dir={run_dir}", "metrics.wandb=disabled", *overrides]) as prepared:
        return prepared


def launch(run_dir: Path, *overrides: str, config: str = "quickstart", timeout_s: float = 300) -> FinishedRun:
    """Run to the end."""
    with started(run_dir, *overrides, config=config) as process:
        output, _ = process.communicate(timeout=timeout_s)
    return FinishedRun(run_dir, process.returncode, output)


@contextmanager
def started(run_dir: Path, *overrides: str, config: str = "quickstart") -> Iterator[subprocess.Popen[str]]:
    """A running launch, killed at the end if it still runs. Output and errors come together.

    It handles Ctrl-C even if these tests were started in the background, where shells have it ignored.
    """
    process = subprocess.Popen(
        command("launch", config, f"run.dir={run_dir}", *SMALL, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str], timeout_s: float = 240) -> None:
    """Until the metrics line of `step` is written."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and step in [line["step"] for line in read_metrics(run_dir)]:
            return
        assert process.poll() is None, f"the run ended early: {process.stdout.read()}"
        time.sleep(0.1)
    raise AssertionError(f"no metrics line of step {step} within {timeout_s} s")


def copy_start_model(to: Path) -> Path:
    return Path(shutil.copytree(START_MODEL, to))
