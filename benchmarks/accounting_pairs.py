"""What accounting costs a whole run: the quickstart with and without it, in turn, same seed in a pair.

    python -m benchmarks.accounting_pairs --num 5 run.steps=36

Without it the clocks, levels and spans of all processes do nothing, so a run has no verdict either: Python imports
`sitecustomize` at its start, and the one that is put on its path here replaces them. Which tokens a run samples depends
on its timing, so processor time is given for a thousand sampled tokens. Prints a JSON line a run, and the medians of
the pairs' ratios, with over without.
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
WITH, WITHOUT = "with", "without"
PYTHONPATH = os.environ.get("PYTHONPATH", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=5, help="pairs")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further keys for every run")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
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


def pairs(rows: list[dict[str, Any]], figure: str) -> list[tuple[float, float]]:
    """With and without, of each seed."""
    found = {(row["seed"], row["mode"]): row[figure] for row in rows}
    return [(found[seed, WITH], found[seed, WITHOUT]) for seed in dict.fromkeys(row["seed"] for row in rows)]


if __name__ == "__main__":
    main()
