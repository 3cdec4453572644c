"""`replay.run_ahead: auto` beside fixed values.

    python benchmarks/pacing.py simulated --seeds 32    the real core in simulated time, on the loads of paced/loads.py
    python benchmarks/pacing.py real --pairs 3          whole runs of the quickstart, `auto` and fixed values in turn

Prints a Markdown table for docs/log.md: wall time as a multiple of the best fixed value's, mean staleness. The real
loads are the quickstart, the same with fewer slots, and with more passes over each batch. Real runs have the machine to
themselves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from asyncdapo.replay.config import FilterConfig, ReplayConfig

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.paced.loads import LOADS  # noqa: E402
from benchmarks.paced.simulation import Simulation  # noqa: E402
from benchmarks.quickstart import run_quickstart  # noqa: E402

FIXED = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
BOUND = 4
REAL_FIXED = (1.0, 2.0, 4.0)
REAL_LOADS = {
    "engine-bound": ("rollout.slots=16",),
    "balanced": (),
    "learner-bound": ("learner.epochs=3",),
}
Measured = tuple[float, float]
"""Seconds, mean staleness."""
Value = float | str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["simulated", "real"])
    parser.add_argument("--seeds", type=int, default=32, help="simulated runs of each value")
    parser.add_argument("--steps", type=int, default=100, help="of a simulated run")
    parser.add_argument("--pairs", type=int, default=3, help="real runs of each value")
    parser.add_argument("--loads", nargs="*", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--out", type=Path, default=Path("runs/pacing"), help="folder of the real runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further keys for every real run")
    args = parser.parse_args()
    print("| load | run_ahead | wall time | mean staleness |\n| --- | --- | --- | --- |")
    for load in args.loads:
        if args.what == "simulated":
            rows = simulated(load, args.seeds, args.steps)
        else:
            rows = real(load, args.pairs, args.out, args.overrides)
        print("\n".join(table(load, rows)), flush=True)


def simulated(load: str, seeds: int, steps: int) -> dict[Value, list[Measured]]:
    """Several seeds of each value."""
    with Pool() as pool:
        return {value: pool.map(partial(simulate, load, value, steps), range(seeds)) for value in (*FIXED, "auto")}


def simulate(load: str, run_ahead: float, steps: int, seed: int) -> Measured:
    """One run in simulated time."""
    config = ReplayConfig(prompts_per_step=16, run_ahead=run_ahead, max_staleness=BOUND)
    result = Simulation(LOADS[load], config, FilterConfig(), seed).run(steps)
    return result.wall_s, result.mean_staleness


def real(load: str, pairs: int, out: Path, overrides: Sequence[str]) -> dict[Value, list[Measured]]:
    """Whole runs, the values in turn on the same seed."""
    rows: dict[Value, list[Measured]] = {value: [] for value in (*REAL_FIXED, "auto")}
    for seed in range(pairs):
        for value, measured in rows.items():
            keys = [f"replay.run_ahead={value}", f"replay.max_staleness={BOUND}", *REAL_LOADS[load], *overrides]
            lines = run_quickstart(out / f"{load}-{value}-{seed}", seed, keys)[1:]
            measured.append(
                (lines[-1]["time/wall_s"], statistics.mean(line["replay/staleness_mean"] for line in lines))
            )
            print(f"{load} {value} seed {seed}: {measured[-1]}", file=sys.stderr, flush=True)
    return rows


def table(load: str, rows: dict[Value, list[Measured]]) -> Iterator[str]:
    """Means over the seeds."""
    walls = {value: statistics.mean(wall_s for wall_s, _ in measured) for value, measured in rows.items()}
    best = min(wall_s for value, wall_s in walls.items() if value != "auto")
    for value, measured in rows.items():
        staleness = statistics.mean(staleness for _, staleness in measured)
        yield f"| {load} | {value} | {walls[value] / best:.3f} | {staleness:.2f} |"


if __name__ == "__main__":
    main()
