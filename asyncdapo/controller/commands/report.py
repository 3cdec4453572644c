"""`asyncdapo report RUN_DIR`: makes a report of a run at W&B.

In: metrics.jsonl of a run that W&B has, a login. Out: a new report: the verdict with its advice, alarms, a table of
results, and below it the board's panels with this run alone. Returns the exit code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from asyncdapo.api import Run
from asyncdapo.controller.commands.sync import at_wandb
from asyncdapo.errors import UserError
from asyncdapo.metrics.alarms import Alarms
from asyncdapo.metrics.dashboard.units import unit_of
from asyncdapo.metrics.sinks.wandb_report import Story, save_report
from asyncdapo.metrics.sinks.wandb_sink import ID_FILE, run_id
from asyncdapo.metrics.sinks.wandb_upload import waiting_launches
from asyncdapo.metrics.verdict.advice import Keys, keys_in_force
from asyncdapo.metrics.verdict.running_verdict import final_words
from asyncdapo.metrics.verdict.window import Line

RESULTS = (
    "reward/mean",
    "eval/accuracy",
    "learner/entropy",
    "replay/staleness_mean",
    "rollout/tokens_per_s",
    "learner/tokens_per_s",
    "time/step_s",
)


def report(run_dir: Path) -> int:
    """Make it, and print its address. Raises UserError without a login, and for a run that W&B doesn't have."""
    run = Run(run_dir)
    config = run.config
    story = story_of(config.run.name, run.metrics(), keys_in_force(config))
    if not (run_dir / ID_FILE).exists() or waiting_launches(run_dir):
        raise UserError(f"{run_dir}: W&B doesn't have all of it (asyncdapo sync {run_dir}, then once more)")
    with at_wandb() as entity:
        print(save_report(entity, config.metrics.wandb_project, run_id(run_dir), story))
    return 0


def story_of(name: str, lines: Sequence[Line], keys: Keys) -> Story:
    """What there is to say about these lines. Raises UserError if there is none."""
    if not lines:
        raise UserError(f"{name}: no step has a line of metrics yet")
    alarms = Alarms({}, {})
    said = [f"Step {line['step']:.0f}: {alarm}" for line in lines for alarm in alarms.check(line)]
    steps = f"{lines[-1]['step']:,.0f} train steps in {lines[-1].get('time/wall_s', math.nan):,.0f} s of training."
    paragraphs = [steps, *final_words(lines, keys), *(said or ["No alarm."])]
    return Story(title=f"{name}: {steps}", paragraphs=paragraphs, table="\n".join(_results(lines)))


def _results(lines: Sequence[Line]) -> Iterator[str]:
    """A table in Markdown, a row for each of `RESULTS` that the run has."""
    yield "| metric | unit | first | lowest | highest | last |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for metric in RESULTS:
        values = [line[metric] for line in lines if math.isfinite(line.get(metric, math.nan))]
        if values:
            cells = [f"{value:,.4g}" for value in (values[0], min(values), max(values), values[-1])]
            yield f"| `{metric}` | {' | '.join([unit_of(metric), *cells])} |"
