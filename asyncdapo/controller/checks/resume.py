"""Where a launch on a used run directory resumes, found in its files before any process starts.

    checkpoints/      the newest whole one that the ledger knows  ─▶ step, checkpoint
    ledger.db         its batches up to that step                 ─▶ lines that metrics.jsonl lacks
    metrics.jsonl     its lines up to that step                   ─▶ last line, whose clocks continue

Reads only. What follows from it is done by those who own the files: the replay server rolls the ledger back, the
reporter takes lines back, `set_aside` renames checkpoints of the undone future. Does not own: whether this is the same
run (`identity`).
"""

from __future__ import annotations

import json
import math
import sqlite3
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from asyncdapo.config.config import Config
from asyncdapo.errors import UserError
from asyncdapo.learner.storage.checkpoint import checkpoint_dir, find_checkpoint, kept_steps
from asyncdapo.metrics.jsonl import to_metrics, whole_lines
from asyncdapo.replay.core.events import VERDICT_STATES
from asyncdapo.replay.ledger.ledger import LEDGER_FILE, last_trained, open_ledger


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Where a run resumes; of a new run, where it begins."""

    new: bool = False
    """Nothing is there yet."""
    step: int = 0
    """Train steps that stay done."""
    checkpoint: Path | None = None
    """Weights, optimizer and random state to resume from; None is the initial model."""
    problems: tuple[str, ...] = ()
    """Newer checkpoints that can't be used, and why."""
    first_line: dict[str, float] = field(default_factory=dict)
    """Metrics line of the first train step that has one; empty when there is none."""
    last_line: dict[str, float] = field(default_factory=dict)
    """Metrics line of `step`, or of the last one before it that has one; empty when there is none."""
    missing_lines: tuple[dict[str, float], ...] = ()
    """Lines of steps that were trained and whose own line was never written, as far as the ledger has their values."""
    finished: bool = False
    """The run has all its steps, its final evaluation too: there is nothing to do."""

    def describe(self) -> list[str]:
        """For people: from where, and what couldn't be used."""
        source = f"checkpoints/{self.checkpoint.name}" if self.checkpoint else "the initial model"
        unused = [f"not used: {problem}" for problem in self.problems]
        return [*unused, f"resumes after step {self.step}, from {source}"]


def survey(run_dir: Path, config: Config) -> Resume:
    """Look at a run directory that no process works in. Raises UserError when no checkpoint can be used, or for a
    ledger that can't be read."""
    try:
        trained = last_trained(run_dir)
        found = find_checkpoint(run_dir, trained)
        missing = missing_lines(run_dir, found.step)
        ended = bool(trained) and _has_ended(run_dir)
    except (sqlite3.Error, json.JSONDecodeError) as error:
        raise unusable_ledger(run_dir, str(error)) from error
    if not trained and any(kept_steps(run_dir)):
        raise unusable_ledger(run_dir, "it is missing or empty")
    lines = [*_lines_until(run_dir, found.step).values(), *missing]
    last_line = max(lines, key=lambda line: line["step"], default={})
    steps_are_done = config.run.steps <= found.step == max(trained, default=-1)
    return Resume(
        step=found.step,
        checkpoint=found.path,
        problems=tuple(found.problems),
        first_line=min((line for line in lines if line["step"] > 0), key=lambda line: line["step"], default={}),
        last_line=last_line,
        missing_lines=tuple(missing),
        finished=ended and steps_are_done and not missing and _was_evaluated(last_line, config),
    )


def unusable_ledger(run_dir: Path, problem: str) -> UserError:
    """A run can't be resumed without its ledger: nothing else says what was trained. A new run can start from its
    weights."""
    newest = max(kept_steps(run_dir), default=0)
    weights = f" from its weights: model.path={checkpoint_dir(run_dir, newest)}" if newest else ""
    fix = f"put a sound copy of it back, without {LEDGER_FILE}-wal; or begin another run.dir{weights}"
    one_line = " ".join(problem.split())  # SQLite quotes statements as they are
    return UserError(f"{run_dir / LEDGER_FILE}: can't be resumed: {one_line} ({fix})")


def missing_lines(run_dir: Path, step: int) -> list[dict[str, float]]:
    """A line for each batch up to `step` that has none (the run died between the training and the line), made from the
    ledger: the learner's metrics and what the batch was. Its clocks are those of the line before
    plus the time between the two batches, if one launch trained both."""
    lines = _lines_until(run_dir, step)
    batches = _batches_until(run_dir, step)
    if all(batch["step"] in lines for batch in batches):
        return []
    counters = _counters(run_dir)
    made: list[dict[str, float]] = []
    before: sqlite3.Row | None = None
    for batch in batches:
        if batch["step"] not in lines:
            line = _line_of(batch, before, lines.get(batch["step"] - 1, {}))
            line |= {name: bisect_right(positions, batch["trained_pos"]) for name, positions in counters.items()}
            lines[batch["step"]] = line
            made.append(line)
        before = batch
    return made


def _line_of(batch: sqlite3.Row, before: sqlite3.Row | None, line_before: Mapping[str, float]) -> dict[str, float]:
    learner = json.loads(batch["summary"])
    step_s = learner.get("learner/train_s", 0.0)
    if before is not None and before["branch"] == batch["branch"]:
        step_s = batch["trained_at_s"] - before["trained_at_s"]
    clocks = ("time/wall_s", "time/total_s")
    return {
        "step": batch["step"],
        **{clock: line_before.get(clock, math.nan) + step_s for clock in clocks},
        **learner,
        "reward/filtered_mean": batch["reward_mean"],
        "replay/train_steps": batch["step"],
        "replay/trained_groups": batch["groups"],
        "replay/copies": sum(json.loads(batch["copies"]).values()),
        "replay/staleness_max": batch["staleness_max"],
        "replay/staleness_mean": batch["staleness_mean"],
    }


def _lines_until(run_dir: Path, step: int) -> dict[int, dict[str, float]]:
    records, _ = whole_lines(run_dir)
    return {int(line["step"]): line for line in map(to_metrics, records) if line["step"] <= step}


def _batches_until(run_dir: Path, step: int) -> list[sqlite3.Row]:
    if not last_trained(run_dir):
        return []
    with closing(open_ledger(run_dir)) as ledger:
        return ledger.execute("SELECT * FROM batches WHERE step <= ? ORDER BY step", (step,)).fetchall()


def _counters(run_dir: Path) -> dict[str, list[int]]:
    """Positions, in rising order, of what each metric counts."""
    verdicts = f"SELECT arrived_pos FROM groups WHERE entered IN {VERDICT_STATES} ORDER BY arrived_pos"
    closed = "SELECT pos FROM events WHERE kind = 'gen_batch_closed' ORDER BY pos"
    with closing(open_ledger(run_dir)) as ledger:
        return {
            name: [position for (position,) in ledger.execute(query)]
            for name, query in (("filter/gen_batches", closed), ("filter/prompts_consumed", verdicts))
        }


def _has_ended(run_dir: Path) -> bool:
    """The stream was closed after the last step, and no rollback has opened it again."""
    with closing(open_ledger(run_dir)) as ledger:
        return bool(ledger.execute("SELECT EXISTS (SELECT 1 FROM events WHERE kind = 'run_ended')").fetchone()[0])


def _was_evaluated(line: Mapping[str, float], config: Config) -> bool:
    """The line has the final evaluation: the greedy one is only made there, and the sampled one is of its version."""
    if config.eval.num_greedy_prompts:
        return "eval/greedy_accuracy" in line
    return not config.eval.num_prompts or line.get("eval/version_min") == line["step"]
