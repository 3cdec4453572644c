"""Runs that are interrupted and launched again, and what must hold of both launches together."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncdapo.controller.process.reaper import descendants, is_alive
from asyncdapo.controller.process.roster import survivors
from asyncdapo.learner.storage.checkpoint import kept_steps
from asyncdapo.metrics.jsonl import read_metrics
from asyncdapo.replay.ledger.audit import audit
from tests.controller.runs import FinishedRun, launch, started

SHORT = ("learner.checkpoint_every=3", "replay.prompts_per_step=4", "eval.num_prompts=8", "eval.num_greedy_prompts=4")
"""Overrides for steps of well under a second, so that an interruption falls anywhere in one."""
STOP_S = 20.0
END_S = 15.0
"""For the processes to end, besides the time that the run has for its step."""


@dataclass(frozen=True)
class Interruption:
    """What stood in the run directory between the two launches."""

    checkpoint: int
    """Step of the newest checkpoint."""
    trained: dict[int, list[int]]
    """Prompts of each trained batch."""
    members: list[int]
    """Prompts of batch checkpoint + 1, when it was cut."""
    num_fresh: int
    """The next prompt of the stream."""
    losses: dict[int, float]


def interrupt(run_dir: Path, sent: signal.Signals, after_s: float, *overrides: str) -> Interruption:
    """Launch, interrupt so long after its first step, and wait until nothing is left."""
    launched_at_s = time.time()
    with started(run_dir, *SHORT, "run.steps=100000", *overrides) as process:
        wait_until(lambda: last_trained_at_s(run_dir) > launched_at_s, process)
        time.sleep(after_s)
        process.send_signal(sent)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == (130 if sent == signal.SIGINT else -sent), output
        assert "Traceback" not in output, output
    assert_nothing_lives(run_dir)
    return survey(run_dir)


def stop(process: subprocess.Popen[str], sent: signal.Signals, within_s: float = STOP_S + END_S) -> str:
    """Ask the run to stop. Returns its output, once it has ended in time and nothing of it is left."""
    below = descendants(process.pid)
    asked_at = time.monotonic()
    process.send_signal(sent)
    output, _ = process.communicate(timeout=within_s + 30)
    assert process.returncode == 130, output
    assert "Traceback" not in output, output
    assert time.monotonic() - asked_at < within_s, output
    deadline = time.monotonic() + END_S
    while left := {process for process in below if is_alive(process)}:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)
    return output


def go_on(run_dir: Path, before: Interruption, num_steps: int = 4, *overrides: str) -> FinishedRun:
    """Launch again for a few steps, and check that the two launches make one run."""
    last = before.checkpoint + num_steps
    run = launch(run_dir, *SHORT, f"run.steps={last}", *overrides)
    assert run.exit_code == 0, run.output
    assert [line["step"] for line in run.lines] == list(range(last + 1))
    assert_resumed(run, before)
    return run


def assert_resumed(run: FinishedRun, before: Interruption) -> None:
    """The launches before and after the interruption make one run."""
    assert f"resumes after step {before.checkpoint}" in run.output, run.output
    after = survey(run.dir)
    first = before.checkpoint + 1
    if first in before.losses:
        assert after.losses[first] == before.losses[first], "the first loss is the one that was recorded"
    if before.members:
        assert after.trained[first] == before.members, "batch k + 1 has the same members"
    old = [prompt for step, prompts in before.trained.items() if step < first for prompt in prompts]
    new = [prompt for step, prompts in after.trained.items() if step >= first for prompt in prompts]
    assert len(set(old + new)) == len(old + new), "no prompt is trained twice"
    assert after.num_fresh >= before.num_fresh
    assert leased_prompts(run.dir) == set(range(after.num_fresh)), "the stream continues at the next position"
    assert audit(run.dir) == []
    assert_nothing_lives(run.dir)


def survey(run_dir: Path) -> Interruption:
    """What the files say now."""
    checkpoint = max(kept_steps(run_dir))
    members = "SELECT prompt_id FROM groups WHERE step = ? ORDER BY prompt_id"
    steps = [step for (step,) in query(run_dir, "SELECT step FROM batches ORDER BY step")]
    lines = {int(line["step"]): line for line in read_metrics(run_dir)}
    return Interruption(
        checkpoint=checkpoint,
        trained={step: [prompt for (prompt,) in query(run_dir, members, step)] for step in steps},
        members=[prompt for (prompt,) in query(run_dir, members, checkpoint + 1)],
        num_fresh=query(run_dir, "SELECT COALESCE(MAX(prompt_id) + 1, 0) FROM prompts")[0][0],
        losses={step: line["learner/loss"] for step, line in lines.items() if "learner/loss" in line},
    )


def leased_prompts(run_dir: Path) -> set[int]:
    """Every prompt with a row."""
    return {prompt for (prompt,) in query(run_dir, "SELECT prompt_id FROM prompts")}


def query(run_dir: Path, sql: str, *parameters: Any) -> list[tuple]:
    """Of the ledger, which this never creates: a launch that finds one without a config refuses the directory."""
    there = f"{(run_dir / 'ledger.db').as_uri()}?mode=rw"
    with closing(sqlite3.connect(there, uri=True, timeout=20)) as ledger:
        return ledger.execute(sql, parameters).fetchall()


def wait_for_batch(run_dir: Path, step: int, process: subprocess.Popen[str], timeout_s: float = 240) -> None:
    """Until batch `step` is trained, as the ledger says."""
    wait_until(lambda: trained_steps(run_dir) >= step, process, timeout_s)


def trained_steps(run_dir: Path) -> int:
    return _of_batches(run_dir, "MAX(step)")


def num_lives_trained_on(run_dir: Path) -> int:
    """In how many of its lives a worker has sampled groups that are trained on by now."""
    trained = "SELECT COUNT(DISTINCT session) FROM groups JOIN leases USING (lease_id) WHERE state = 'trained'"
    return query(run_dir, trained)[0][0]


def last_trained_at_s(run_dir: Path) -> float:
    """When the last batch was trained, in seconds since 1970."""
    return _of_batches(run_dir, "MAX(trained_at_s)")


def _of_batches(run_dir: Path, what: str) -> Any:
    try:
        return query(run_dir, f"SELECT COALESCE({what}, 0) FROM batches")[0][0]
    except sqlite3.OperationalError:  # not there yet
        return 0


def wait_until(true, process: subprocess.Popen[str], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert process.poll() is None, f"the run ended early: {process.stdout.read()}"
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.1)


def assert_nothing_lives(run_dir: Path, within_s: float = 10) -> None:
    """No process of the run is left, as its roster lists them."""
    deadline = time.monotonic() + within_s
    while left := survivors(run_dir):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def processes(run_dir: Path, role: str) -> list[int]:
    """Pids of a role, as RUN_DIR/processes.json lists them."""
    return [entry["pid"] for entry in json.loads((run_dir / "processes.json").read_text()) if entry["role"] == role]


def some_moment(seed: int) -> float:
    """Seconds after step 1: while the run samples, trains, publishes or writes a checkpoint."""
    return random.Random(seed).uniform(0, 6)
