"""`python -m tests.simulation.run --seed 1234 --trace`: the run of a seed again, step by step; or of many seeds."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulation.plan import draw
from tests.simulation.world import simulate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=1, help="seeds from --seed on")
    parser.add_argument("--trace", action="store_true", help="print the plan and everything that happens")
    parser.add_argument("--files", action="store_true", help="on real files")
    parser.add_argument("--keep-going", action="store_true")
    args = parser.parse_args()
    started, cpu, counts, ends, steps, bad = time.monotonic(), time.process_time(), Counter(), Counter(), 0, []
    for seed in range(args.seed, args.seed + args.num):
        if args.trace:
            print(draw(seed))
        try:
            outcome = simulate(seed, files=args.files, trace=args.trace)
        except Exception as error:
            print(*getattr(error, "trace", ()), sep="\n")
            print(f"seed {seed}: {type(error).__name__}: {error}")
            if not args.keep_going:
                raise
            bad.append(seed)
            continue
        print(*outcome.trace, sep="\n", end="\n" if outcome.trace else "")
        counts.update(outcome.counts)
        ends[outcome.end.split(":")[0]] += 1
        steps += outcome.steps
    wall_s, cpu_s = time.monotonic() - started, time.process_time() - cpu
    print(f"{args.num} runs in {wall_s:.1f} s ({cpu_s:.1f} s of CPU), {steps} steps; {dict(counts)}; ends {dict(ends)}")
    if bad:
        print("failed:", *bad)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
