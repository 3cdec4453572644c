"""Whole runs for the tests: the real command in a process of its own, small enough for a few seconds of training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        return [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]


def launch(run_dir: Path, *overrides: str, config: str = "quickstart", timeout_s: float = 110) -> FinishedRun:
    """Run to the end."""
    process = start(run_dir, *overrides, config=config)
    output, _ = process.communicate(timeout=timeout_s)
    return FinishedRun(run_dir, process.returncode, output)


def start(run_dir: Path, *overrides: str, config: str = "quickstart") -> subprocess.Popen[str]:
    """Start and return at once; output and errors come together."""
    return subprocess.Popen(
        command("launch", config, f"run.dir={run_dir}", *SMALL, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str], timeout_s: float = 90) -> None:
    """Until the metrics line of `step` is written."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and f'"step": {step}' in path.read_text().replace('"step":', '"step": ').replace("  ", " "):
            return
        assert process.poll() is None, f"the run ended early: {process.stdout.read()}"
        time.sleep(0.1)
    raise AssertionError(f"no metrics line of step {step} within {timeout_s} s")


def copy_start_model(to: Path) -> Path:
    return Path(shutil.copytree(START_MODEL, to))
