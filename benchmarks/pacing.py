"""`replay.run_ahead: auto` beside fixed values, and `replay.on_stale: auto` beside the others.

    python benchmarks/pacing.py simulated --seeds 32    the real core in simulated time, on the loads of paced/loads.py
    python benchmarks/pacing.py real --pairs 3          whole runs of the quickstart, `auto` and fixed values in turn
    python benchmarks/pacing.py lengths --seeds 8       what becomes of long answers at a tight bound, in simulated time

Prints a Markdown table for docs/log.md; wall time is a multiple of the best fixed value's. The real loads are in
`paced/runs.py`; real runs have the machine to themselves, and three pairs of all loads take about 20 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

from asyncdapo.replay.config import FilterConfig, ReplayConfig

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.paced import runs  # noqa: E402
from benchmarks.paced.loads import LOADS, LONG_ANSWERS  # noqa: E402
from benchmarks.paced.runs import Value  # noqa: E402
from benchmarks.paced.simulation import Simulation, bias  # noqa: E402

FIXED = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
BOUND = 4


class Measured(NamedTuple):
    """One run."""

    wall_s: float
    waited: float
    """Share of the time that the learner waited for a batch."""
    staleness: float
    """Mean."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["simulated", "real", "lengths"])
    parser.add_argument("--seeds", type=int, default=32, help="simulated runs of each value")
    parser.add_argument("--steps", type=int, default=100, help="of a simulated run")
    parser.add_argument("--pairs", type=int, default=3, help="real runs of each value")
    parser.add_argument("--loads", nargs="*", choices=list(LOADS), help="all, unless some are named")
    parser.add_argument("--out", type=Path, default=Path("runs/pacing"), help="folder of the real runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further keys for every real run")
    args = parser.parse_intermixed_args()
    if args.what == "lengths":
        print("\n".join(lengths(args.seeds, args.steps)))
        return
    if args.what == "real":
        if not runs.LOADS.keys() >= {*(args.loads or ())}:
            parser.error(f"--loads: of real runs there are {', '.join(runs.LOADS)}")
        real(args.loads or list(runs.LOADS), args.pairs, args.out, args.overrides)
        return
    print("| load | run_ahead | wall time | the learner waits | mean staleness |\n| --- | --- | --- | --- | --- |")
    for load in args.loads or LOADS:
        print("\n".join(table(load, simulated(load, args.seeds, args.steps))), flush=True)


def real(loads: Sequence[str], pairs: int, out: Path, overrides: Sequence[str]) -> None:
    """A table of all loads, and what kind of load each one is."""
    by_load = {load: runs.measure(load, pairs, out, overrides) for load in loads}
    print(runs.HEADING)
    for load, of_load in by_load.items():
        print("\n".join(runs.table(load, of_load)))
    print()
    for load, of_load in by_load.items():
        print(runs.describe(load, of_load))


def simulated(load: str, seeds: int, steps: int) -> dict[Value, list[Measured]]:
    """Several seeds of each value."""
    with Pool() as pool:
        return {value: pool.map(partial(simulate, load, value, steps), range(seeds)) for value in (*FIXED, "auto")}


def simulate(load: str, run_ahead: Value, steps: int, seed: int) -> Measured:
    """One run in simulated time."""
    config = ReplayConfig(prompts_per_step=16, run_ahead=run_ahead, max_staleness=BOUND)
    result = Simulation(LOADS[load], config, FilterConfig(), seed).run(steps)
    return Measured(result.wall_s, result.waited_s / result.wall_s, result.mean_staleness)


def lengths(seeds: int, steps: int) -> Iterator[str]:
    """A table: what each `on_stale` costs, and how far the lengths trained on are from those sampled."""
    yield "| on_stale | wall time | dropped groups | Kolmogorov–Smirnov of lengths |\n| --- | --- | --- | --- |"
    for on_stale in ("drop", "requeue", "wait", "auto"):
        config = ReplayConfig(prompts_per_step=16, run_ahead=1, max_staleness=1, on_stale=on_stale)
        simulations = [Simulation(LONG_ANSWERS, config, FilterConfig(), seed) for seed in range(seeds)]
        results = [simulation.run(steps) for simulation in simulations]
        trained, sampled = (sum(of_all, []) for of_all in zip(*(each.lengths() for each in simulations), strict=True))
        num_taken = sum(simulation.state.stream.num_taken for simulation in simulations)
        dropped = sum(len(result.dropped) for result in results) / num_taken
        wall_s = statistics.mean(result.wall_s for result in results)
        yield f"| {on_stale} | {wall_s:,.0f} s | {dropped:.1%} | {bias(trained, sampled):.4f} |"


def table(load: str, rows: dict[Value, list[Measured]]) -> Iterator[str]:
    """Means over the seeds."""
    means = {value: Measured(*map(statistics.mean, zip(*measured, strict=True))) for value, measured in rows.items()}
    best = min(mean.wall_s for value, mean in means.items() if value != "auto")
    for value, mean in means.items():
        yield f"| {load} | {value} | {mean.wall_s / best:.3f} | {mean.waited:.1%} | {mean.staleness:.2f} |"


if __name__ == "__main__":
    main()
