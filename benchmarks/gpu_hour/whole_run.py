"""A whole run of the real command: vLLM and the learner on one GPU, with a generated model. Optionally a process is
killed in the middle (`--kill engine`, or another role of `processes.json`), and has to restart while the learner keeps
its memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from asyncdapo.controller.process.roster import Entry, is_running, read
from asyncdapo.metrics.jsonl import read_metrics
from asyncdapo.replay.ledger.audit import audit
from benchmarks.gpu_hour.check import Figures, hold, main
from benchmarks.gpu_hour.models import SMALL, made
from benchmarks.learner_step.shapes import SHAPES

COMMON = """rollout.engine=vllm reward.verifier=benchmarks/gpu_hour/verdict.py:coin rollout.parity_every=2
eval.num_prompts=8 eval.num_greedy_prompts=4 eval.every=100 metrics.wandb=disabled learner.checkpoint_every=3"""
ON_GPU = """controller.placement=shared rollout.dtype=bfloat16 rollout.slots=128 rollout.max_response_length=512
replay.prompts_per_step=32 learner.tokens_per_microbatch=16384 learner.lr=1e-6"""
ON_CPU = """rollout.dtype=float32 rollout.slots=8 rollout.group_size=4 rollout.max_response_length=24
replay.prompts_per_step=4 learner.tokens_per_microbatch=1024"""
STEPS, ENDLESS = 6, 1_000_000
KILL_AT, AFTER_DEATH = 2, 3
"""The step after which a process is killed, and how many more have to be trained once it is back."""
POLL_S = 0.2
INTERRUPTED = 130
KEPT = (
    "learner/train_s",
    "learner/peak_gib",
    "learner/tflops",
    "learner/mfu",
    "learner/time/wait_s",
    "weights/publish_s",
    "weights/pause_s",
    "weights/load_s",
    "rollout/parity_mean",
    "rollout/parity_max",
)


def measure(figures: Figures, args: Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shape = SMALL if args.cpu else SHAPES["qwen2.5-0.5b"]
        model, run_dir = made(shape, Path(folder) / "model"), Path(folder) / "run"
        keys = [*COMMON.split(), *(ON_CPU if args.cpu else ON_GPU).split()]
        keys.append(f"run.steps={ENDLESS if args.kill else STEPS}")
        launch = ["launch", "quickstart", f"run.dir={run_dir}", f"model.path={model}", *keys]
        began_s = time.monotonic()
        with subprocess.Popen([sys.executable, "-m", "asyncdapo.cli", *launch]) as process:
            try:
                if args.kill:
                    figures.add(**_kill(args.kill, run_dir, process))
                    process.send_signal(signal.SIGINT)
                code = process.wait()
            except BaseException:
                process.kill()  # else its end would be waited for
                raise
        figures.add(seconds=round(time.monotonic() - began_s, 1), **_trained(run_dir, figures.found))
        hold(code == (INTERRUPTED if args.kill else 0), f"the run ended with code {code}")
        hold(not (breaches := audit(run_dir)), f"audit: {breaches}")


def _trained(run_dir: Path, death: dict[str, float]) -> dict[str, object]:
    """What the metrics say: of every kept one the last value. `death`: what `_kill` found, if it was called."""
    lines = read_metrics(run_dir)
    last = {name: line[name] for line in lines for name in KEPT if name in line}
    parts = ", ".join(f"{name} {value:.3g}" for name, value in (death | last).items() if value == value)
    return {"steps": lines[-1]["step"], "last": last, "summary": f"{lines[-1]['step']:.0f} steps, sound; {parts}"}


def _kill(role: str, run_dir: Path, process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Kill the first process of this role in the middle. Returns the seconds until there was another one, and until
    steps were trained with it."""
    _until(lambda: _step(run_dir) >= KILL_AT and _of(role, run_dir), process)
    victim = _of(role, run_dir)[0]
    os.kill(victim.pid, signal.SIGKILL)
    killed_s = time.monotonic()
    _until(lambda: any(is_running(one) for one in _of(role, run_dir) if one.pid != victim.pid), process)
    again_s, step = time.monotonic() - killed_s, _step(run_dir)
    _until(lambda: _step(run_dir) >= step + AFTER_DEATH, process)
    return {"again_s": round(again_s, 1), "trained_s": round(time.monotonic() - killed_s, 1)}


def _of(role: str, run_dir: Path) -> list[Entry]:
    return [entry for entry in read(run_dir) if entry.role == role]


def _step(run_dir: Path) -> float:
    lines = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return lines[-1]["step"] if lines else -1


def _until(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        hold(process.poll() is None, f"the run ended with code {process.returncode}")
        time.sleep(POLL_S)


if __name__ == "__main__":
    main(measure, "--kill")
