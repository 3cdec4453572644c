"""What sinks cost the steps of a run, with a W&B server that answers well, slowly, with errors, or not at all.

    python -m benchmarks.sinks --steps 400 --step-ms 20 --sinks tensorboard prometheus

A process of its own logs steps of every documented metric through a `Reporter`, with W&B online, and the other sinks if
they are named. Between steps it sleeps, as a controller that waits. Prints a JSON line for each kind of server:
`log_ms`, the longest and the 99th percentile of a step's call; `late_ms`, how much longer than asked a sleep took: what
imports and work in the sinks' threads take from the main thread; the same without any sink as `none`; `close_s`, what
the end of the run waits; what was said.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from asyncdapo.metrics.config import MetricsConfig
from asyncdapo.metrics.reporter import Reporter
from tests.metrics.documented import EVERY
from tests.metrics.sinks.wandb_server import wandb_server

MOODS = ("well", "slow", "errors", "silent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=20.0, help="from step to step")
    parser.add_argument("--start-s", type=float, default=6.0)
    parser.add_argument("--sinks", nargs="*", default=[], help="beside wandb")
    parser.add_argument("--moods", nargs="*", default=["none", *MOODS], help="of the server")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        print(json.dumps(steps_of(args.start_s, args.steps, args.step_ms / 1000, args.inside.split())))
        return
    for mood in args.moods:
        sinks = "" if mood == "none" else " ".join(["wandb", *args.sinks])
        with wandb_server("well" if mood == "none" else mood) as server, tempfile.TemporaryDirectory() as folder:
            more = server.environment() | {"HOME": folder, "TRACKIO_DIR": folder, "WANDB_MODE": "online"}
            command = [sys.executable, "-m", "benchmarks.sinks", "--steps", str(args.steps)]
            command += ["--step-ms", str(args.step_ms), "--start-s", str(args.start_s), "--inside", sinks]
            done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=True)
            print(json.dumps({"server": mood, **json.loads(done.stdout.splitlines()[-1])}), flush=True)


def steps_of(start_s: float, num_steps: int, step_s: float, sinks: list[str]) -> dict[str, Any]:
    """Log so many steps, and time them."""
    output, logged_s, late_s = io.StringIO(), [], []
    with tempfile.TemporaryDirectory() as folder:
        config = MetricsConfig(sinks=tuple(sinks), prometheus_address="127.0.0.1:0")  # pyright: ignore[reportArgumentType]
        reporter = Reporter(Path(folder), config, "benchmark", num_steps, keys={}, stream=output)
        time.sleep(start_s)
        for step in range(num_steps):
            line = {"step": step} | dict.fromkeys(EVERY, step / 2)
            began = time.perf_counter()
            reporter.log(line)
            logged = time.perf_counter()
            time.sleep(step_s)
            logged_s.append(logged - began)
            late_s.append(time.perf_counter() - logged - step_s)
        began = time.perf_counter()
        reporter.close()
        closed_s = time.perf_counter() - began
    said = [line[10:] for line in output.getvalue().splitlines() if not line[10:].startswith("step")]
    return {"log_ms": _summary(logged_s), "late_ms": _summary(late_s), "close_s": round(closed_s, 2), "said": said}


def _summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"max": round(ordered[-1] * 1000, 2), "p99": round(ordered[int(0.99 * len(ordered))] * 1000, 2)}


if __name__ == "__main__":
    main()
