"""The quickstart, measured: whole runs of the real command, one after the other, nothing else on the machine.

    python benchmarks/quickstart.py seeds --num 5     the learning curve on several seeds
    python benchmarks/quickstart.py sync --num 5      the same without running ahead: `replay.run_ahead` 0
    python benchmarks/quickstart.py control --num 1   verdicts shuffled within each group: there is nothing to learn

Prints one JSON line a run, and at the end the medians as a Markdown table for `docs/log.md`. Every run is audited.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyncdapo.metrics.jsonl import read_metrics

SYNC = ("replay.run_ahead=0",)
NO_EVALUATION = ("eval.num_prompts=0", "eval.num_greedy_prompts=0")
MODES: dict[str, tuple[str, ...]] = {"seeds": (), "sync": SYNC, "control": ("reward.shuffle=true",)}
SECONDS = ("wall_s", "to_90_s", "total_s")
STATES = ("wait", "train", "publish", "checkpoint", "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--num", type=int, default=3, help="runs")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder of the run directories")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further keys for every run")
    args = parser.parse_intermixed_args()

    rows = []
    for seed in range(args.first, args.first + args.num):
        row = measure(args.out / f"{args.mode}-{seed}", args.mode, seed, [*MODES[args.mode], *args.overrides])
        print(json.dumps(row), flush=True)
        rows.append(row)
    print(table(rows))


def measure(run_dir: Path, mode: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The figures of one run. Raises CalledProcessError when the launch or the audit fails."""
    lines = run_quickstart(run_dir, seed, overrides)
    steps, evaluated = lines[1:], [line for line in lines if "eval/accuracy" in line]
    reached = [line["eval/wall_s"] for line in evaluated if line["eval/accuracy"] >= 0.9]
    return {
        "mode": mode,
        "seed": seed,
        "accuracy": [round(line["eval/accuracy"], 3) for line in evaluated],
        "greedy": [round(lines[at]["eval/greedy_accuracy"], 3) for at in (0, -1)],
        "steps": len(steps),
        "wall_s": round(steps[-1]["time/wall_s"], 1),
        "total_s": round(steps[-1]["time/total_s"], 1),
        "to_90_s": round(reached[0], 1) if reached else None,
        "staleness_mean": round(statistics.mean(line["replay/staleness_mean"] for line in steps), 2),
        "staleness_max": max(line["replay/staleness_max"] for line in steps),
        "stale_steps": sum(line["replay/staleness_max"] > 0 for line in steps),
        "generate_s": round(steps[-1]["rollout/time/generate_s"], 1),
        **{f"{state}_s": round(sum(line[f"controller/{state}_s"] for line in steps), 1) for state in STATES},
    }


def run_quickstart(run_dir: Path, seed: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Launch and audit. Returns the metrics lines. Raises CalledProcessError when either fails."""
    asyncdapo = [sys.executable, "-m", "asyncdapo.cli"]
    keys = [f"run.dir={run_dir}", f"run.seed={seed}", "metrics.wandb=disabled", *overrides]
    subprocess.run([*asyncdapo, "launch", "quickstart", *keys], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*asyncdapo, "audit", str(run_dir)], check=True, stdout=subprocess.DEVNULL)
    return read_metrics(run_dir)


def table(rows: list[dict[str, Any]]) -> str:
    """A line: medians over the runs, accuracies as minimum–maximum."""
    median = {key: statistics.median(row[key] or float("inf") for row in rows) for key in SECONDS}
    spans = (
        span([row["accuracy"][0] for row in rows]),
        span([row["accuracy"][-1] for row in rows]),
        span([row["greedy"][1] for row in rows]),
    )
    figures = " | ".join(f"{median[key]:.1f}" for key in SECONDS)
    return "\n".join(
        [
            "| mode | runs | first | last | greedy last | wall s | to 0.90 s | total s |",
            "|---" * 8 + "|",
            f"| {rows[0]['mode']} | {len(rows)} | {' | '.join(spans)} | {figures} |",
        ]
    )


def span(values: list[float]) -> str:
    return f"{min(values):.3f}–{max(values):.3f}"


if __name__ == "__main__":
    main()
