"""Real runs with several values of `replay.run_ahead`, in turn: the quickstart with a few keys, by its own accounts.

In: a load of `LOADS`, seeds. Out: what a run took after its first steps, and a Markdown table. What is compared is the
ratio of two runs of the same seed; the order of the values rotates from seed to seed. So that the load of a run is the
same from its first step to its last one, the learning rate changes nothing, and nothing is evaluated meanwhile. The
table says of each load which stage takes longer, and whether it is what it is called. Does not own: simulated runs.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from operator import truediv
from pathlib import Path
from typing import Any, Literal, NamedTuple

from asyncdapo.metrics.verdict.window import Window
from benchmarks.quickstart import NO_EVALUATION, run_quickstart

Value = float | Literal["auto"]

FIXED: tuple[Value, ...] = (1.0, 2.0, 4.0)
KEYS = (
    "replay.max_staleness=4",
    "learner.lr=1e-9",
    "learner.checkpoint_every=1000",
    *NO_EVALUATION,
)
"""Of every load."""
LOADS = {
    "engine-bound": ("rollout.group_size=2", "replay.prompts_per_step=32", "run.steps=24"),
    "balanced": ("rollout.group_size=4", "replay.prompts_per_step=24", "learner.epochs=2", "run.steps=24"),
    "learner-bound": ("rollout.group_size=16", "replay.prompts_per_step=8", "learner.epochs=2", "run.steps=24"),
}
"""The fewer completions stand in a group, the fewer groups the filter keeps, and the more are sampled for a batch. With
two epochs the learner takes twice as long for it."""
KINDS = {"engine-bound": (1.33, float("inf")), "balanced": (0.9, 1.1), "learner-bound": (0.0, 0.7)}
"""What is called so: the engine's time a step as a multiple of the learner's, from and to."""
NUM_FIRST = 3
"""Steps that aren't measured: the first batch is waited for, `auto` has begun with its first value."""


class Measured(NamedTuple):
    """One run, after its first steps, by its own accounts. Seconds are of a train step unless it says otherwise."""

    wall_s: float
    """Of the whole run, its first steps included."""
    step_s: float
    token_s: float
    """Of a token that was trained on."""
    token_cpu_s: float
    """The learner's processor time for it: what differs here is due to the machine."""
    learner_s: float
    """The training loop did something else than to wait for a batch."""
    engine_s: float
    """The worker had a lease."""
    waited: float
    """Share of the time that the learner waited for a batch."""
    overlap: float
    """Share of the time that the busier one of the two was busy."""
    staleness: float
    """Mean."""

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]]) -> Measured:
        """`lines`: of `metrics.jsonl`."""
        lines = lines[NUM_FIRST:]
        window, steps = Window.of(lines), lines[1:]
        if window is None:
            raise ValueError(f"{len(lines)} steps are too few for an account")
        waited, unleased = window.loop["wait"], window.workers["lease"]
        tokens = sum(line["learner/tokens"] for line in steps)
        return cls(
            wall_s=lines[-1]["time/wall_s"],
            step_s=window.step_s,
            token_s=window.step_s * len(steps) / tokens,
            token_cpu_s=sum(line["learner/cpu_s"] for line in steps) / tokens,
            learner_s=window.step_s * (1 - waited),
            engine_s=window.step_s * (1 - unleased),
            waited=waited,
            overlap=1 - min(waited, unleased),
            staleness=statistics.mean(line["replay/staleness_mean"] for line in steps),
        )


def measure(load: str, seeds: int, out: Path, overrides: Sequence[str]) -> dict[Value, list[Measured]]:
    """Whole runs, by value and seed. Raises CalledProcessError when one of them fails."""
    values: list[Value] = [*FIXED, "auto"]
    runs: dict[Value, list[Measured]] = {value: [] for value in values}
    for seed in range(seeds):
        first = seed % len(values)
        for value in values[first:] + values[:first]:
            keys = [*KEYS, *LOADS[load], f"replay.run_ahead={value}", *overrides]
            runs[value].append(Measured.of(run_quickstart(out / f"{load}-{value}-{seed}", seed, keys)))
            print(f"{load} {value} seed {seed}: {runs[value][-1]}", file=sys.stderr, flush=True)
    return runs


HEADING = (
    "| load | run_ahead | wall time | after the first steps | of a token | CPU time of a token "
    "| learner, engine: s a step | the learner waits | overlap | mean staleness |\n" + "| --- " * 10 + "|"
)


def table(load: str, runs: Mapping[Value, Sequence[Measured]]) -> Iterator[str]:
    """Medians over the seeds. The first four are multiples of the best fixed value's, each of its own best one's."""
    times = [multiples(runs, name) for name in ("wall_s", "step_s", "token_s", "token_cpu_s")]
    for value, of_value in runs.items():
        median = Measured(*map(statistics.median, zip(*of_value, strict=True)))
        yield (
            f"| {load} | {value} | {' | '.join(f'{of_values[value]:.3f}' for of_values in times)} "
            f"| {median.learner_s:.2f}, {median.engine_s:.2f} "
            f"| {median.waited:.1%} | {median.overlap:.3f} | {median.staleness:.2f} |"
        )


def multiples(runs: Mapping[Value, Sequence[Measured]], name: str) -> dict[Value, float]:
    """The median of the ratios to the best fixed value's run of the same seed."""
    times: dict[Value, list[float]] = {value: [getattr(run, name) for run in runs[value]] for value in runs}
    best = times[min(FIXED, key=lambda value: statistics.median(times[value]))]
    ratios: dict[Value, float] = {value: statistics.median(map(truediv, times[value], best)) for value in runs}
    return ratios


def auto_beside_best(runs: Mapping[Value, Sequence[Measured]], name: str) -> float:
    """The median over the seeds of the ratio of `auto` to the fixed value that is best in the other seeds. With noise
    one of several values is always lucky: in the seeds by which it is chosen it looks better than it is."""
    times: dict[Value, list[float]] = {value: [getattr(run, name) for run in runs[value]] for value in runs}
    ratios = []
    for seed, own in enumerate(times["auto"]):
        medians = {value: statistics.median(times[value][:seed] + times[value][seed + 1 :]) for value in FIXED}
        ratios.append(own / times[min(FIXED, key=lambda value: medians[value])][seed])
    return statistics.median(ratios)


def describe(load: str, runs: Mapping[Value, Sequence[Measured]]) -> str:
    """Which stage takes longer, with the largest value, where they wait for each other least; and what `auto` takes."""
    ratio = statistics.median(run.engine_s / run.learner_s for run in runs[FIXED[-1]])
    least, most = KINDS[load]
    said = "" if least <= ratio <= most else f": NOT {load}, that is {least:g} to {most:g}"
    said = f"{load}: the engine takes {ratio:.2f} times as long as the learner{said}"
    if len(runs["auto"]) > 1:
        run, token = (auto_beside_best(runs, name) for name in ("wall_s", "token_s"))
        said += f"; auto takes {run:.3f} of the best fixed value's time for a run, {token:.3f} for a token"
    return said
