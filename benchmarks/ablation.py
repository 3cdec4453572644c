"""What each part of DAPO does on the quickstart, one change at a time.

    python benchmarks/ablation.py run [--only NAME …]     the missing runs, one after the other
    python benchmarks/ablation.py report                  the table and the picture of docs/dapo.md, from the runs

Every run is a whole `asyncdapo launch quickstart` with a few keys changed, and is audited. A change has three seeds;
the two anchors have one for each `replay.run_ahead`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from quickstart import run_quickstart

from asyncdapo.metrics.jsonl import read_metrics

SEEDS = (0, 1, 2)
SHORT = "rollout.max_response_length=64"
COLUMNS = (0, 6, 12, 18, 24, 30, 36)


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    name: str
    panel: str
    """Arms of a panel are compared with each other."""
    overrides: tuple[str, ...] = ()
    seeds: Sequence[int] = SEEDS


def anchored(anchor: str, run_ahead: int) -> Arm:
    keys = (f"loss.anchor={anchor}", f"replay.run_ahead={run_ahead}", f"replay.max_staleness={run_ahead + 1}")
    return Arm(f"{anchor}-{run_ahead}", "anchors", keys, seeds=(0,))


ARMS = (
    Arm("dapo", "parts"),
    Arm("no-clip-higher", "parts", ("loss.clip_high=0.2",)),
    Arm("no-dual-clip", "parts", ("loss.dual_clip=null",)),
    Arm("no-dynamic-sampling", "parts", ("filter.enabled=false",)),
    Arm("seq-mean", "parts", ("loss.agg=seq-mean-token-mean",)),
    Arm("64-tokens", "overlong", (SHORT,)),
    Arm("64-tokens-shaping", "overlong", (SHORT, "reward.overlong_buffer=16")),
    *(anchored(anchor, run_ahead) for run_ahead in (1, 2, 4) for anchor in ("behavior", "proximal")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--only", nargs="*", default=[arm.name for arm in ARMS], metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of the run directories")
    parser.add_argument("--picture", type=Path, default=Path("docs/dapo.png"))
    args = parser.parse_args()
    arms = [arm for arm in ARMS if arm.name in args.only]
    if args.what == "run":
        for seed in SEEDS:
            for arm in arms:
                if seed in arm.seeds:
                    run(args.out, arm, seed)
    else:
        runs = {arm: list(read(args.out, arm)) for arm in arms}
        print(table(runs))
        draw(runs, args.picture)


def run(out: Path, arm: Arm, seed: int) -> None:
    run_dir = out / f"{arm.name}-{seed}"
    if not (run_dir / "curve.png").exists():  # the last thing that a run writes
        run_quickstart(run_dir, seed, arm.overrides)
    last = read_metrics(run_dir)[-1]
    print(f"{run_dir.name}: {last['eval/accuracy']:.3f} after {last['time/wall_s']:.0f} s", flush=True)


def read(out: Path, arm: Arm) -> Iterator[list[dict[str, Any]]]:
    for seed in arm.seeds:
        yield read_metrics(out / f"{arm.name}-{seed}")


def table(runs: Mapping[Arm, list[list[dict[str, Any]]]]) -> str:
    """Means over the seeds; of the last accuracy its range, too."""
    head = ["arm", *map(str, COLUMNS), "range", "greedy", "entropy", "kept", "truncated", "tokens", "staleness"]
    out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, seeds in runs.items():
        steps, first, last = (
            [line for lines in seeds for line in lines[1:]],
            [lines[1] for lines in seeds],
            [lines[-1] for lines in seeds],
        )
        cells = [
            arm.name,
            *(short(mean(accuracy_at(lines, step) for lines in seeds)) for step in COLUMNS),
            "–".join(short(pick(line["eval/accuracy"] for line in last)) for pick in (min, max)[: len(seeds)]),
            short(mean(line["eval/greedy_accuracy"] for line in last)),
            " → ".join(short(mean(line["learner/entropy"] for line in some)) for some in (first, last)),
            f"{mean(kept_ratio(line) for line in steps):.2f}",
            f"{mean(line['rollout/truncated_ratio'] for line in steps):.2f}",
            f"{mean(line['rollout/tokens'] - line['replay/tokens_evaluation'] for line in last) / 1000:.0f} k",
            f"{mean(line['replay/staleness_mean'] for line in steps):.2f} / "
            f"{max(line['replay/staleness_max'] for line in steps):.0f}",
        ]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def short(number: float) -> str:
    return f"{number:.3f}".removeprefix("0")


def curve(lines: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Train steps and accuracies. Weights may change during an evaluation: it counts at the middle of the versions that
    answered it."""
    evaluated = [line for line in lines if "eval/accuracy" in line]
    middles = [(line["eval/version_min"] + line["eval/version_max"]) / 2 for line in evaluated]
    return middles, [line["eval/accuracy"] for line in evaluated]


def accuracy_at(lines: Sequence[Mapping[str, Any]], step: int) -> float:
    """Linear between evaluations."""
    return float(np.interp(step, *curve(lines)))


def kept_ratio(line: Mapping[str, Any]) -> float:
    """Share of the groups whose completions are not all right or all wrong, whether the filter is on or off."""
    return 1 - line["filter/all_correct_ratio"] - line["filter/all_wrong_ratio"]


def draw(runs: Mapping[Arm, list[list[dict[str, Any]]]], path: Path) -> None:
    """Accuracy by step: a thin line a seed, a thick one for their mean; a panel for arms that belong together."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(arm.panel for arm in runs))
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), sharey=True, squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        axis.set(title=panel, xlabel="train step", ylim=(0.3, 1.0))
        axis.grid(alpha=0.3)
        for number, (arm, seeds) in enumerate((arm, runs[arm]) for arm in runs if arm.panel == panel):
            color = f"C{number}"
            for lines in seeds:
                axis.plot(*curve(lines), color=color, lw=0.6, alpha=0.5)
            steps = range(COLUMNS[-1] + 1)
            means = [mean(accuracy_at(lines, step) for lines in seeds) for step in steps]
            axis.plot(steps, means, color=color, lw=2, label=arm.name)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("accuracy on held-out prompts, sampled")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
