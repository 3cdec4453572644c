"""A run directory that is launched again: where it resumes, as its files say."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdapo.config.config import Config, load_config
from asyncdapo.controller.checks.resume import missing_lines, survey
from asyncdapo.errors import UserError
from asyncdapo.learner.storage.checkpoint import checkpoint_dir
from asyncdapo.metrics.jsonl import MetricsFile
from asyncdapo.replay.ledger.journal import Journal
from tests.controller.runs import prepare
from tests.learner.storage.written import write_checkpoint
from tests.replay.small_run import resumed_run


def train(run_dir: Path, *steps: int, branch: int = 0, ended: bool = False) -> None:
    """Rows of these batches, each trained 2 s after the one before."""
    Journal(run_dir).close()
    with sqlite3.connect(run_dir / "ledger.db") as ledger:
        for step in steps:
            summary = json.dumps({"learner/loss": 0.125 * step, "learner/k3": math.nan, "learner/train_s": 0.5})
            row = (step, branch, step - 1, 16, "{}", 4000, 1, 0.5, -0.25, summary, 10 * step, 1000.0 + 2 * step)
            ledger.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        if ended:
            ledger.execute("INSERT INTO events (kind, branch, detail, pos, at_s) VALUES ('run_ended', 0, '', 9999, 0)")
    ledger.close()


def save(run_dir: Path, *steps: int, branch: int = 0) -> None:
    for step in steps:
        write_checkpoint(run_dir, step, branch, lambda directory: (directory / "weights").write_text("whole"))


def log(run_dir: Path, *steps: int, **last: float) -> None:
    """Metrics lines of these steps; `last` are further metrics of the last of them."""
    file = MetricsFile(run_dir)
    for step in steps:
        file.log({"step": step, "time/wall_s": 2.0 * step, "time/total_s": 2.0 * step + 5})
    if last:
        file.amend({name.replace("__", "/"): value for name, value in last.items()})
    file.close()


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of 4 steps with a final evaluation."""
    overrides = [f"run.dir={tmp_path_factory.mktemp('run')}", "run.steps=4"]
    return load_config(Path("configs/quickstart.yaml").resolve(), overrides)


@pytest.fixture
def run_dir(config: Config) -> Path:
    return Path(config.run.dir)


def test_a_run_resumes_from_its_newest_checkpoint_and_the_line_of_that_step(config: Config, run_dir: Path) -> None:
    train(run_dir, 1, 2, 3)
    save(run_dir, 0, 2)
    log(run_dir, 0, 1, 2, 3)
    resume = survey(run_dir, config)
    assert (resume.step, resume.checkpoint, resume.problems) == (2, checkpoint_dir(run_dir, 2), ())
    assert resume.last_line == {"step": 2, "time/wall_s": 4.0, "time/total_s": 9.0}
    assert resume.missing_lines == ()
    assert not resume.finished
    assert resume.describe() == ["resumes after step 2, from checkpoints/step-000002"]


def test_a_checkpoint_that_cannot_be_used_is_named_and_the_one_before_is_taken(config: Config, run_dir: Path) -> None:
    train(run_dir, 1, 2, 3)
    save(run_dir, 0, 1, 2, 3)
    (checkpoint_dir(run_dir, 3) / "weights").write_text("whale")
    (checkpoint_dir(run_dir, 2) / "weights").unlink()
    resume = survey(run_dir, config)
    assert resume.step == 1
    assert resume.describe() == [
        "not used: step-000003: weights is damaged (another sha256 than was written)",
        "not used: step-000002: weights is missing",
        "resumes after step 1, from checkpoints/step-000001",
    ]


def test_a_run_stopped_before_its_first_checkpoint_begins_with_the_initial_model(config: Config, run_dir: Path) -> None:
    resume = survey(run_dir, config)
    assert (resume.new, resume.step, resume.checkpoint, resume.last_line) == (False, 0, None, {})
    assert resume.describe() == ["resumes after step 0, from the initial model"]
    Journal(run_dir).close()
    log(run_dir, 0)
    assert survey(run_dir, config).last_line["step"] == 0


def test_a_line_that_was_never_written_is_made_from_the_ledger(config: Config, run_dir: Path) -> None:
    train(run_dir, 1, 2, 3)
    save(run_dir, 0, 3)
    log(run_dir, 0, 1, 2)
    (line,) = survey(run_dir, config).missing_lines
    assert math.isnan(line.pop("learner/k3"))
    assert line == {
        "step": 3,
        "time/wall_s": 6.0,
        "time/total_s": 11.0,
        "learner/loss": 0.375,
        "learner/train_s": 0.5,
        "reward/filtered_mean": -0.25,
        "filter/gen_batches": 0,
        "filter/prompts_consumed": 0,
        "replay/train_steps": 3,
        "replay/trained_groups": 16,
        "replay/copies": 0,
        "replay/staleness_max": 1,
        "replay/staleness_mean": 0.5,
    }
    assert survey(run_dir, config).last_line["step"] == 3


def test_counters_of_such_lines_are_those_that_the_lines_had(tmp_path: Path) -> None:
    """In a run of four branches, whose groups came before and after what was undone."""
    resumed_run(tmp_path)
    names = ("step", "filter/gen_batches", "filter/prompts_consumed", "replay/train_steps", "replay/trained_groups")
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[1:]]
    (tmp_path / "metrics.jsonl").write_text("")
    made = missing_lines(tmp_path, 4)
    assert [[line[name] for name in names] for line in made] == [[line[name] for name in names] for line in written]


def test_clocks_of_such_a_line_leave_out_the_time_between_two_launches(run_dir: Path) -> None:
    train(run_dir, 1, 2)
    train(run_dir, 3, 4, branch=1)
    log(run_dir, 0, 1, 2)
    assert [line["time/wall_s"] for line in missing_lines(run_dir, 4)] == [4.5, 6.5]


def test_lines_that_a_torn_file_lost_are_made_too(run_dir: Path) -> None:
    train(run_dir, 1, 2)
    log(run_dir, 0)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("\0" * 30 + '\n{"step": 2, "rew')
    assert [line["step"] for line in missing_lines(run_dir, 2)] == [1, 2]
    assert [line["step"] for line in missing_lines(run_dir, 1)] == [1]


def test_what_a_killed_replay_server_had_committed_counts(config: Config, run_dir: Path) -> None:
    code = f"""
import os, signal, sqlite3
from asyncdapo.replay.ledger.journal import Journal
Journal(__import__("pathlib").Path({str(run_dir)!r})).close()
ledger = sqlite3.connect({str(run_dir / "ledger.db")!r}, isolation_level=None)
ledger.execute("INSERT INTO batches VALUES (1, 0, 0, 16, '{{}}', 4000, 0, 0.0, 0.0, '{{}}', 10, 1.0)")
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (run_dir / "ledger.db-wal").stat().st_size > 0
    save(run_dir, 0, 1)
    assert survey(run_dir, config).step == 1


@pytest.mark.parametrize(
    ("steps", "ended", "last", "changes", "finished"),
    [
        (4, True, {"eval__greedy_accuracy": 0.5}, {}, True),
        (4, True, {"eval__greedy_accuracy": 0.5}, {"run.steps": 3}, True),
        (4, True, {"eval__greedy_accuracy": 0.5}, {"run.steps": 5}, False),
        (4, False, {"eval__greedy_accuracy": 0.5}, {}, False),
        (4, True, {"eval__version_min": 4}, {}, False),
        (4, True, {"eval__version_min": 4}, {"eval.num_greedy_prompts": 0}, True),
        (4, True, {"eval__version_min": 2}, {"eval.num_greedy_prompts": 0}, False),
        (4, True, {}, {"eval.num_greedy_prompts": 0, "eval.num_prompts": 0}, True),
        (3, True, {"eval__greedy_accuracy": 0.5}, {}, False),
    ],
)
def test_a_run_is_finished_when_its_last_step_is_evaluated_and_its_stream_closed(
    run_dir: Path, steps: int, ended: bool, last: dict, changes: dict, finished: bool
) -> None:
    train(run_dir, *range(1, steps + 1), ended=ended)
    save(run_dir, 0, steps)
    log(run_dir, *range(steps + 1), **last)
    overrides = [f"run.dir={run_dir}", "run.steps=4", *(f"{key}={value}" for key, value in changes.items())]
    assert survey(run_dir, load_config(Path("configs/quickstart.yaml").resolve(), overrides)).finished == finished


def test_a_finished_run_without_its_last_line_or_checkpoint_resumes(run_dir: Path) -> None:
    overrides = [f"run.dir={run_dir}", "run.steps=4", "eval.num_prompts=0", "eval.num_greedy_prompts=0"]
    config = load_config(Path("configs/quickstart.yaml").resolve(), overrides)
    train(run_dir, 1, 2, 3, 4, ended=True)
    save(run_dir, 0, 4)
    log(run_dir, 0, 1, 2, 3)
    resume = survey(run_dir, config)
    assert (resume.step, resume.finished) == (4, False)
    (checkpoint_dir(run_dir, 4) / "weights").unlink()
    resume = survey(run_dir, config)
    assert (resume.step, resume.finished) == (0, False)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    run_dir, keys = tmp_path / "run", ("run.steps=2", "eval.num_prompts=0", "eval.num_greedy_prompts=0")
    prepare(run_dir, *keys)
    train(run_dir, 1, 2, ended=True)
    save(run_dir, 0, 2)
    log(run_dir, 0, 1, 2)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    launched = subprocess.run(
        [sys.executable, "-m", "asyncdapo.cli", "launch", "quickstart", f"run.dir={run_dir}"]
        + ["metrics.wandb=disabled", *keys, "run.steps=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (launched.returncode, launched.stderr) == (0, "")
    assert launched.stdout == f"{run_dir} has its 2 steps; raise run.steps to continue\n"
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    changed = {path.name for path in before | after if before.get(path) != after.get(path)}
    assert changed <= {"launch.lock", "ledger.db-shm", "ledger.db-wal"}
    overrides = [f"run.dir={run_dir}", *keys, "run.steps=3"]
    resume = survey(run_dir, load_config(Path("configs/quickstart.yaml").resolve(), overrides))
    assert (resume.step, resume.finished) == (2, False)


def test_a_damaged_ledger_is_named(config: Config, run_dir: Path) -> None:
    train(run_dir, 1)
    content = (run_dir / "ledger.db").read_bytes()
    (run_dir / "ledger.db").write_bytes(b"\0" * 4096 + content[4096:])
    with pytest.raises(UserError, match=r"ledger.db: can't be resumed: .*put a sound copy of it back"):
        survey(run_dir, config)
