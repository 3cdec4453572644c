"""What accounting costs a whole run: the quickstart with and without it, in turn, same seed in a pair.

    python -m benchmarks.accounting_pairs --num 5 run.steps=36
    python -m benchmarks.accounting_pairs --inside run.steps=36     the time spent in its functions, in one run

Without it the clocks, levels and spans of all processes do nothing, so a run has no verdict either: Python imports
`sitecustomize` at its start, and the one that is put on its path here replaces them. Which tokens a run samples depends
on its timing, so processor time is given for a thousand sampled tokens. Prints a JSON line a run, and the medians of
the pairs' ratios, with over without. Two runs on a machine that isn't quiet differ by more than accounting costs, so
`--inside` measures it in one: every call of its functions is timed, a call within a call twice.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.quickstart import run_quickstart

NOTHING = """
from collections import defaultdict
from contextlib import contextmanager

from asyncdapo.accounting import clock, spans

@contextmanager
def nothing(*args):
    yield

for kind in (clock.StateClock, clock.SharedClock):
    kind.take = kind.totals = lambda self: defaultdict(float, wait=0.0)
    kind.take_spans = lambda self: []
clock.StateClock.enter = clock.Level.set = lambda self, state: None
clock.SharedClock.begin = lambda self: None
clock.SharedClock.on = clock.Level.raised = nothing
clock.Level.total = lambda self: 0.0
spans.SpanRing.add = lambda self, span: None
spans.SpanFile.write = lambda self, **tracks: None
"""
INSIDE = """
import os
import time
from functools import wraps
from pathlib import Path

from asyncdapo.accounting import clock, spans

spent_s = 0.0

def timed(work):
    @wraps(work)
    def run(*args, **keys):
        global spent_s
        began_s = time.perf_counter()
        try:
            return work(*args, **keys)
        finally:
            spent_s += time.perf_counter() - began_s
            if work.__name__ == "write":
                Path(__file__).with_name(f"{os.getpid()}.spent").write_text(str(spent_s))
    return run

for kind in (clock.StateClock, clock.SharedClock, clock.Level, spans.SpanRing, spans.SpanFile):
    for name, work in list(vars(kind).items()):
        if callable(work) and name != "__init__":
            setattr(kind, name, timed(work))
"""
WITH, WITHOUT = "with", "without"
PYTHONPATH = os.environ.get("PYTHONPATH", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=5, help="pairs")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--inside", action="store_true", help="time its functions in one run instead")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further keys for every run")
    args = parser.parse_intermixed_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if args.inside:
            print(json.dumps(measure_inside(Path(folder), args.first, args.overrides)))
            return
        for seed in range(args.first, args.first + args.num):
            for mode in (WITH, WITHOUT) if seed % 2 else (WITHOUT, WITH):
                row = {"seed": seed, "mode": mode, **measure(Path(folder), mode, seed, args.overrides)}
                print(json.dumps(row), flush=True)
                rows.append(row)
    for figure in ("wall_s", "cpu_s_per_1000_tokens"):
        ratios = [pair[0] / pair[1] for pair in pairs(rows, figure)]
        print(f"{figure}, with over without: {', '.join(f'{ratio:.3f}' for ratio in ratios)}", end="; ")
        print(f"median {statistics.median(ratios):.3f}")


def measure(folder: Path, mode: str, seed: int, overrides: list[str]) -> dict[str, float]:
    """Wall time of the training, and processor time of worker, replay server and learner."""
    off = folder / "off"
    off.mkdir(exist_ok=True)
    (off / "sitecustomize.py").write_text(NOTHING)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(off), PYTHONPATH]) if mode == WITHOUT else PYTHONPATH
    lines = run_quickstart(folder / f"{mode}-{seed}", seed, overrides)
    last, learner_s = lines[-1], sum(line["learner/cpu_s"] for line in lines[1:])
    cpu_s, tokens = learner_s + last["rollout/cpu_s"] + last["replay/cpu_s"], last["rollout/tokens"]
    has_verdict = any("verdict/overlap_ratio" in line for line in lines)
    assert has_verdict == (mode == WITH), "the accounts are those that were asked for"
    return {
        "wall_s": round(last["time/wall_s"], 2),
        "cpu_s": round(cpu_s, 2),
        "tokens": tokens,
        "cpu_s_per_1000_tokens": round(1000 * cpu_s / tokens, 4),
    }


def measure_inside(folder: Path, seed: int, overrides: list[str]) -> dict[str, float]:
    """Time in the functions of accounting, of all processes up to their last step, beside the processor time of
    worker, replay server and learner."""
    (folder / "sitecustomize.py").write_text(INSIDE)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), PYTHONPATH])
    lines = run_quickstart(folder / "run", seed, overrides)
    spent = [float(path.read_text()) for path in folder.glob("*.spent")]
    cpu_s = sum(line["learner/cpu_s"] for line in lines[1:]) + lines[-1]["rollout/cpu_s"] + lines[-1]["replay/cpu_s"]
    figures = {"inside_s": sum(spent), "cpu_s": cpu_s, "wall_s": lines[-1]["time/wall_s"]}
    return {name: round(value, 3) for name, value in figures.items()} | {"processes": len(spent)}


def pairs(rows: list[dict[str, Any]], figure: str) -> list[tuple[float, float]]:
    """With and without, of each seed."""
    found = {(row["seed"], row["mode"]): row[figure] for row in rows}
    return [(found[seed, WITH], found[seed, WITHOUT]) for seed in dict.fromkeys(row["seed"] for row in rows)]


if __name__ == "__main__":
    main()
