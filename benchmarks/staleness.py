"""What each loss loses by staleness: the quickstart trained on samples of weights that are exactly S versions old.

    python -m benchmarks.staleness [--tasks chain …] [--staleness 0 16 …] [--methods tis …] [--seeds 0 …]
    python -m benchmarks.staleness --report        the tables, and the picture of docs/staleness.md

One process, no Ray: the torch engine, the verifier, the filter and the learner of the product, with a queue of past
weights between them. Batch k is sampled by version max(0, k − 1 − S) and trained by version k − 1. So every token of a
batch is equally old; in a run staleness has a spread, and `replay.max_staleness` is its end.

A cell (task, S, method, seed) is a line of the results file, and one that stands there is not run again. As sampling
depends on weights, prompt and seed alone, what version 0 has sampled is the same for every method, and sampled once.

Seconds are of processor time, so other work on the machine doesn't show. `seconds` of a step is what it takes where
sampling and training overlap ideally: the longer of the two, and their sum at staleness 0, where they can't.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from asyncdapo.config.config import Config
from asyncdapo.learner.step.learner import Learner
from asyncdapo.shares import Batch, Dealer
from benchmarks.staleness_study.report import report
from benchmarks.staleness_study.sampler import Sampled, Sampler, quickstart_config

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "staleness_study" / "results.jsonl"
STALENESS = (0, 1, 2, 4, 8, 16, 32)
METHODS: dict[str, tuple[str, ...]] = {
    "ppo-behavior": (),
    "proximal": ("loss.anchor=proximal", "loss.correction_band=[0,1000]"),
    "tis": ("loss.anchor=proximal",),
    "icepop": ("loss.anchor=proximal", "loss.correction_mode=mask", "loss.correction_band=[0.5,5]"),
    "gspo": ("loss.variant=gspo", "loss.clip_low=3e-4", "loss.clip_high=4e-4", "loss.agg=seq-mean-token-mean"),
    "cispo": ("loss.variant=cispo", "loss.clip_low=1", "loss.clip_high=0.28"),
    "m2po": ("loss.variant=m2po",),
    "vespo": ("loss.variant=vespo",),
    "dppo": ("loss.variant=dppo_tv",),
}
"""With the values of their papers; `proximal` is `tis` without its cap."""
EVAL_EVERY = 8
NUM_EVAL, NUM_LAST_EVAL = 256, 2048
"""Held-out prompts, one completion each: a standard error of .03 at most, and of .01 at the end."""
WATCHED = (
    "ess",
    "clip_low_ratio",
    "clip_high_ratio",
    "untrusted_ratio",
    "masked_ratio",
    "gate_mean",
    "k3",
    "entropy",
    "kept_ratio",
)
"""Metrics of the learner, and the share of the groups that the filter kept."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    task: str
    staleness: int
    method: str
    seed: int


def make_learner(config: Config, staleness: int) -> Learner:
    return Learner(
        config.model,
        config.loss,
        replace(config.learner, device="cpu"),
        temperature=config.rollout.temperature,
        staleness_bound=staleness,
        max_response_length=config.rollout.max_response_length,
        num_steps=config.run.steps,
        seed=config.run.seed,
    )


def run(cell: Cell, sampler: Sampler, num_steps: int) -> dict[str, Any]:
    """The line of a cell: accuracies and seconds at the evaluated steps, means of the metrics between them."""
    overrides = [f"run.seed={cell.seed}", f"run.steps={num_steps}", *METHODS[cell.method]]
    config = quickstart_config(overrides)
    learner = make_learner(config, cell.staleness)
    past = deque([_copy(learner)], maxlen=cell.staleness + 1)
    line: dict[str, Any] = asdict(cell) | {"steps": [0], "seconds": [0.0], "sample_s": [0.0], "train_s": [0.0]}
    sampler.load(0, past[0])
    line["accuracy"] = [sampler.accuracy(0, NUM_EVAL)]
    means: list[dict[str, float]] = []
    next_prompt, seconds = 0, [0.0, 0.0, 0.0]
    for step in range(1, num_steps + 1):
        version = max(0, step - 1 - cell.staleness)
        sampler.load(version, past[0])
        sampled = sampler.batch(step, next_prompt, version)
        next_prompt, began_s = sampled.next_prompt, time.process_time()
        metrics = _train(learner, sampled, step, cell.staleness) | {"learner/kept_ratio": sampled.kept_ratio}
        parts = sampled.seconds, time.process_time() - began_s
        taken = (*parts, max(parts) if cell.staleness else sum(parts))
        seconds = [sum(pair) for pair in zip(seconds, taken, strict=True)]
        past.append(_copy(learner))
        means.append({name: metrics[f"learner/{name}"] for name in WATCHED if f"learner/{name}" in metrics})
        if step % EVAL_EVERY == 0 or step == num_steps:
            sampler.load(step, past[-1])
            line["steps"].append(step)
            line["accuracy"].append(sampler.accuracy(step, NUM_LAST_EVAL if step == num_steps else NUM_EVAL))
            for name, value in zip(("sample_s", "train_s", "seconds"), seconds, strict=True):
                line[name].append(value)
            for name in means[0]:
                line.setdefault(name, []).append(mean(one[name] for one in means))
            means = []
    return {name: _rounded(value) for name, value in line.items()}


def _train(learner: Learner, sampled: Sampled, step: int, staleness: int) -> dict[str, float]:
    batch = Batch(
        step=step, branch=0, max_staleness=staleness, groups=sampled.groups, deal=Dealer().deal(sampled.groups)
    )
    return learner.train(learner.prepare(batch, sampled.payloads))


def _copy(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learner.weights().items()}


def _rounded(value: Any) -> Any:
    """Lists to four digits."""
    return [float(f"{number:.4g}") for number in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=("chain", "long"), default=("chain", "long"))
    parser.add_argument("--staleness", nargs="*", type=int, default=STALENESS)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="tables and picture from the results, no runs")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "staleness.png")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    if args.report:
        report(lines, tuple(METHODS), STALENESS, args.picture)
        return
    torch.set_num_threads(1)
    done = {Cell(*(line[name] for name in ("task", "staleness", "method", "seed"))) for line in lines}
    for seed, task in product(args.seeds, args.tasks):
        cells = [Cell(task, staleness, method, seed) for staleness, method in product(args.staleness, args.methods)]
        missing = [cell for cell in cells if cell not in done]
        sampler = Sampler(task, seed, NUM_LAST_EVAL) if missing else None
        for cell in missing:
            assert sampler is not None
            line = run(cell, sampler, args.steps)
            with args.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(cell, line["accuracy"], f"{line['sample_s'][-1]:.0f} + {line['train_s'][-1]:.0f} s", flush=True)
        if sampler:
            sampler.stop()


if __name__ == "__main__":
    main()
