"""What the cells of `benchmarks/staleness.py` come to: tables in Markdown, and a picture.

In: lines of the results file. A figure or a curve is the mean over the seeds that were run; .750 (.700–.800) has the
least and the most of several, – says that the cell wasn't run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

Line = Mapping[str, Any]
TITLES = {"chain": "the quickstart's chains", "long": "long chains"}
GOAL = 0.9
SHOWN_STALENESS = 16
"""Whose curves are drawn."""


def report(lines: Sequence[Line], methods: Sequence[str], staleness: Sequence[int], picture: Path) -> None:
    """Print the tables and draw the picture."""
    for task in TITLES:
        of_task = [line for line in lines if line["task"] == task]
        if of_task:
            print(f"{TITLES[task]}: accuracy at the last step\n\n{matrix(of_task, methods, staleness)}\n")
            print(f"{TITLES[task]}: cell by cell\n\n{cells(of_task, methods, staleness)}\n")
    draw(lines, methods, staleness, picture)


def matrix(lines: Sequence[Line], methods: Sequence[str], staleness: Sequence[int]) -> str:
    """The last accuracy of each method at each staleness."""
    rows = [[method, *(_last(seeds_of(lines, method, one)) for one in staleness)] for method in methods]
    return table(["", *map(str, staleness)], rows)


def cells(lines: Sequence[Line], methods: Sequence[str], staleness: Sequence[int]) -> str:
    """Of each cell that was run: accuracies by step, seconds to GOAL, and what the last third of its steps measured."""
    steps = [f"{step:.0f}" for step in lines[0]["steps"][1:]]
    head = ["staleness", "", *steps, f"s to {short(GOAL)}", "s", "ESS", "clipped", "k3", "kept"]
    rows = []
    for one in staleness:
        for method in methods:
            if seeds := seeds_of(lines, method, one):
                accuracies = [short(mean(line["accuracy"][at] for line in seeds)) for at in range(1, len(steps) + 1)]
                late = {name: mean(late_mean(line, name) for line in seeds) for name in ("ess", "k3", "kept_ratio")}
                rows.append(
                    [
                        str(one),
                        method,
                        *accuracies,
                        _seconds_to_goal(seeds),
                        f"{mean(line['seconds'][-1] for line in seeds):.0f}",
                        short(late["ess"]),
                        short(mean(map(clipped, seeds))),
                        f"{late['k3']:.2g}",
                        short(late["kept_ratio"]),
                    ]
                )
    return table(head, rows)


def seeds_of(lines: Sequence[Line], method: str, staleness: int) -> list[Line]:
    return [line for line in lines if (line["method"], line["staleness"]) == (method, staleness)]


def late_mean(line: Line, name: str) -> float:
    """Over the last third of the steps; 0 for what the method doesn't have."""
    values = line.get(name, [0.0])
    return mean(values[-max(1, len(values) // 3) :])


def clipped(line: Line) -> float:
    """Share of the tokens that the loss clips or masks."""
    return sum(
        late_mean(line, name) for name in ("clip_low_ratio", "clip_high_ratio", "untrusted_ratio", "masked_ratio")
    )


def seconds_to(line: Line, goal: float) -> float | None:
    """Linear between evaluations; None if it was never reached."""
    for at, accuracy in enumerate(line["accuracy"]):
        if accuracy >= goal:
            return float(np.interp(goal, line["accuracy"][at - 1 : at + 1], line["seconds"][at - 1 : at + 1]))
    return None


def _seconds_to_goal(seeds: Sequence[Line]) -> str:
    found = [seconds for line in seeds if (seconds := seconds_to(line, GOAL)) is not None]
    return f"{mean(found):.0f}" if len(found) == len(seeds) else "never"


def _last(seeds: Sequence[Line]) -> str:
    if not seeds:
        return "–"
    last = [line["accuracy"][-1] for line in seeds]
    return short(mean(last)) + (f" ({short(min(last))}–{short(max(last))})" if len(seeds) > 1 else "")


def short(number: float) -> str:
    return f"{number:.3f}".removeprefix("0")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def draw(lines: Sequence[Line], methods: Sequence[str], staleness: Sequence[int], path: Path) -> None:
    """A row for each task: the last accuracy by staleness, and the curves of one staleness by step and by second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in TITLES if any(line["task"] == task for line in lines)]
    figure, axes = plt.subplots(len(tasks), 3, figsize=(15, 4.2 * len(tasks)), squeeze=False)
    for (by_staleness, by_step, by_second), task in zip(axes, tasks, strict=True):
        of_task = [line for line in lines if line["task"] == task]
        for number, method in enumerate(methods):
            found = {one: seeds_of(of_task, method, one) for one in staleness}
            run = [one for one in staleness if found[one]]
            last = [mean(line["accuracy"][-1] for line in found[one]) for one in run]
            by_staleness.plot(run, last, "o-", color=f"C{number}", label=method)
            _draw_curves(by_step, by_second, found[SHOWN_STALENESS], color=f"C{number}")
        _draw_curves(by_step, by_second, seeds_of(of_task, methods[0], 0), color="k", linestyle="--")
        by_staleness.set(title=f"{TITLES[task]}: at the last step", xlabel="staleness, versions", ylabel="accuracy")
        by_staleness.set_xscale("symlog", base=2)
        by_staleness.set_xticks(staleness, [str(one) for one in staleness])
        by_staleness.set_xlim(-0.2, 1.2 * staleness[-1])
        by_staleness.legend(fontsize=8)
        dashed = f"staleness {SHOWN_STALENESS}; dashed: {methods[0]} at 0"
        by_step.set(title=dashed, xlabel="train step")
        by_second.set(title=dashed, xlabel="seconds of processor time, sampling beside training")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def _draw_curves(by_step: Any, by_second: Any, seeds: Sequence[Line], **style: str) -> None:
    if seeds:
        steps, seconds, accuracy = (
            np.mean([line[name] for line in seeds], axis=0) for name in ("steps", "seconds", "accuracy")
        )
        by_step.plot(steps, accuracy, **style)
        by_second.plot(seconds, accuracy, **style)
