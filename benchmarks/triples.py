"""Time to .90 of the quickstart: asynchronous, synchronous and by TRL, in turn on each seed, all measured alike.

    python -m benchmarks.triples --num 5 --trl-python TRL/bin/python [--sync-threads 1 2] [key=value …]

    async          learner and engine with one thread each, at the same time
    sync1, sync2   the same with `replay.run_ahead=0`: the two take turns, each with one thread or two
    trl            `trl_quickstart.py` with two threads

No arm evaluates. Each saves a checkpoint every two steps, beside its clock. After the run one engine in this process
measures them all: the same held-out prompts and seeds for every arm, seed and step, at temperature 1. So the clocks
hold no evaluation, and accuracies differ by their weights alone.

What the clocks hold: ours (`time/wall_s`) everything from the first lease to the metrics line of the step, with what
the run waits for its checkpoints and what writing them takes from it. TRL's holds its train steps alone, with sampling
and rewards, and stands still while it saves. Neither holds the start. Keys hold for our arms only.

`to_90_s` is the clock at the first checkpoint of .90 or above, `interpolated_s` where the line to it from the one
before crosses .90. A row is appended to `--out` when its run is measured, and what stands there isn't run again. At the
end comes a Markdown table of all rows, with the ratios of each seed: of its faster synchronous arm, and of TRL.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from safetensors.torch import load_file

from asyncdapo.learner.storage.checkpoint import checkpoint_dir, kept_steps
from asyncdapo.metrics.jsonl import read_metrics
from benchmarks.quickstart import NO_EVALUATION, SYNC, run_quickstart
from benchmarks.staleness_study.sampler import Sampler

ROOT = Path(__file__).resolve().parents[1]
TARGET, SAVE_EVERY, NUM_PROMPTS = 0.9, 2, 512
STEPS = {"async": 28, "sync": 32, "trl": 32}
"""Train steps of each kind of arm: more than it needs as a rule. A rival that never reaches `TARGET` counts with its
last clock, so it has some more."""
KEYS = (f"learner.checkpoint_every={SAVE_EVERY}", "learner.keep_checkpoints=0", *NO_EVALUATION)
"""Of our arms: every checkpoint is kept, and nothing is evaluated."""
TIMES = ("to_90_s", "interpolated_s")

Row = dict[str, Any]
Pair = tuple[float, float]
"""By the first checkpoint, and by interpolation."""
Launch = Callable[[Path, int], object]
"""Runs an arm: run directory, seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=5, help="seeds")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--steps", type=int, help=f"train steps of every arm in place of {STEPS}")
    parser.add_argument("--sync-threads", type=int, nargs="*", default=[1, 2], help="a synchronous arm for each")
    parser.add_argument("--trl-python", metavar="PYTHON", help="of an environment with TRL; without it there is no arm")
    parser.add_argument("--out", type=Path, default=Path("runs/triples.jsonl"), help="file of the rows")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further keys for our arms")
    args = parser.parse_intermixed_args()

    setting = {"asked_steps": args.steps, "keys": args.overrides}
    rows = read_rows(args.out)
    if any(row[name] != value for row in rows for name, value in setting.items()):
        parser.error(f"--out {args.out}: holds rows of other steps or keys (give another file)")
    sampler = Sampler("chain", seed=0, num_eval=NUM_PROMPTS)
    for seed in range(args.first, args.first + args.num):
        for arm, launch in arms(args).items():
            if any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
                continue
            with tempfile.TemporaryDirectory() as folder:
                launch(run_dir := Path(folder, "run"), seed)
                row = {"arm": arm, "seed": seed, **setting, **measure(run_dir, sampler)}
            append(args.out, row)
            rows.append(row)
    sampler.stop()
    print(table(rows))


# ---------------------------------------------------------------------------------------------------------------- arms


def arms(args: argparse.Namespace) -> dict[str, Launch]:
    """What runs each of them, in the order of a turn."""
    steps = {kind: args.steps or number for kind, number in STEPS.items()}
    ours = [*KEYS, f"run.steps={steps['async']}", *args.overrides]
    found: dict[str, Launch] = {"async": partial(run_quickstart, overrides=ours)}
    for threads in args.sync_threads:
        keys = [*SYNC, f"run.steps={steps['sync']}", f"learner.threads={threads}", f"rollout.threads={threads}"]
        found[f"sync{threads}"] = partial(run_quickstart, overrides=[*KEYS, *keys, *args.overrides])
    if args.trl_python:
        found["trl"] = partial(run_trl, python=args.trl_python, num_steps=steps["trl"])
    return found


def run_trl(run_dir: Path, seed: int, *, python: str, num_steps: int) -> None:
    """Raises CalledProcessError when it fails."""
    options = {"seed": seed, "steps": num_steps, "save-every": SAVE_EVERY, "threads": 2}
    command = [python, "benchmarks/trl_quickstart.py", str(run_dir.absolute())]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=env)


# ------------------------------------------------------------------------------------------------------------- figures


def measure(run_dir: Path, sampler: Sampler) -> Row:
    """The accuracy of every checkpoint beside the clock at the end of its step."""
    lines = {int(line["step"]): line for line in read_metrics(run_dir)}
    steps = kept_steps(run_dir)
    clocks = [lines[step]["time/wall_s"] for step in steps]
    accuracies = []
    for step in steps:
        sampler.load(step, load_file(checkpoint_dir(run_dir, step) / "model.safetensors"))
        accuracies.append(sampler.accuracy(step, NUM_PROMPTS))
    staleness = [line.get("replay/staleness_mean", 0.0) for step, line in lines.items() if step]
    return {
        "steps": steps,
        "clocks_s": [round(clock, 1) for clock in clocks],
        "accuracy": [round(accuracy, 3) for accuracy in accuracies],
        **reached(clocks, accuracies),
        "staleness_mean": round(mean(staleness), 2),
    }


def reached(clocks: Sequence[float], accuracies: Sequence[float]) -> dict[str, float | None]:
    """When `TARGET` was first reached, two ways; None where it wasn't. The first checkpoint is of the initial model."""
    first = next((at for at, accuracy in enumerate(accuracies) if accuracy >= TARGET), None)
    if first is None:
        return dict.fromkeys(TIMES)
    if first == 0:
        return dict.fromkeys(TIMES, clocks[0])
    (began, low), (ended, high) = ((clocks[at], accuracies[at]) for at in (first - 1, first))
    crossing = began + (TARGET - low) / (high - low) * (ended - began)
    return {"to_90_s": round(ended, 1), "interpolated_s": round(crossing, 1)}


def table(rows: Sequence[Row]) -> str:
    """A line a seed: seconds of each arm, and the ratios; then medians and ranges. In brackets by interpolation."""
    found = {(row["arm"], row["seed"]): row for row in rows}
    names, seeds = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    columns: dict[str, dict[int, Pair]] = {
        arm: {seed: pair_of(found[arm, seed], math.inf) for seed in seeds if (arm, seed) in found} for arm in names
    }
    for kind in ("sync", "trl"):
        column = columns[f"{kind} / async"] = {}
        for seed in seeds:
            rivals = [found[arm, seed] for arm in names if arm.startswith(kind) and (arm, seed) in found]
            if rivals and ("async", seed) in found:
                column[seed] = ratios(found["async", seed], rivals)
    heads = ["seed", *columns]
    out = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    out += [table_line(str(seed), [column.get(seed) for column in columns.values()]) for seed in sorted(seeds)]
    for name, pick in (("median", median), ("least", min), ("most", max)):
        picked = [tuple(map(pick, zip(*column.values(), strict=True))) for column in columns.values()]
        out.append(table_line(name, picked))
    return "\n".join(out)


def pair_of(row: Row, never: float) -> Pair:
    to_90_s, interpolated_s = (never if row[time] is None else row[time] for time in TIMES)
    return to_90_s, interpolated_s


def ratios(ours: Row, rivals: Sequence[Row]) -> Pair:
    """How many times as long as we the fastest rival took. What doesn't reach `TARGET` counts against us: a rival with
    its last clock, so that the ratio is at least this, and we with infinity."""
    theirs = [pair_of(row, row["clocks_s"][-1]) for row in rivals]
    fastest, own = [min(times) for times in zip(*theirs, strict=True)], pair_of(ours, math.inf)
    return fastest[0] / own[0], fastest[1] / own[1]


def table_line(name: str, pairs: Iterable[Sequence[float] | None]) -> str:
    texts = [f"{pair[0]:.3g} ({pair[1]:.3g})" if pair else "-" for pair in pairs]
    return f"| {name} | {' | '.join(texts)} |".replace("inf (inf)", "never")


# ---------------------------------------------------------------------------------------------------------------- rows


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
