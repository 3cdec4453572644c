"""Longer runs with a learner of several ranks: they train as one, and live and die as one. A short one is in
`test_deaths`."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from asyncdapo.learner.storage.checkpoint import checkpoint_dir
from asyncdapo.replay.ledger.audit import audit
from tests.controller.interruptions import (
    SHORT,
    assert_nothing_lives,
    processes,
    query,
    trained_steps,
    wait_for_batch,
    wait_until,
)
from tests.controller.runs import launch, started

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

TWO = (*SHORT, "learner.ranks=2", "learner.shards=2", "learner.updates_per_step=2")
EVERY = 3
"""Steps from one checkpoint to the next, as in `SHORT`."""
NUM_KILLS = 6


def finish(run_dir: Path, output: str, num_branches: int) -> None:
    """What holds at the end of every run."""
    assert query(run_dir, "SELECT branch FROM branches ORDER BY branch") == [(n,) for n in range(num_branches)]
    assert audit(run_dir) == [], output
    assert_nothing_lives(run_dir)


@pytest.mark.parametrize("point", ["learner-1.before_train:2", "learner-1.after_train:3", "learner.in_checkpoint:2"])
def test_a_death_at_any_point_of_a_step_is_outlived(tmp_path: Path, point: str) -> None:
    run = launch(tmp_path / "run", *TWO, "run.steps=6", f"faults.kill=[{point}]")
    assert run.exit_code == 0, run.output
    assert [line["step"] for line in run.lines] == list(range(7))
    finish(run.dir, run.output, num_branches=2)


@pytest.mark.parametrize(
    ("point", "num_branches"),
    [("learner.in_send_weights:3", 2), ("learner-1.in_give_shards:3", 2), ("rollout-0.in_load_weights:2", 1)],
)
def test_a_death_while_shards_are_published_is_outlived(tmp_path: Path, point: str, num_branches: int) -> None:
    three = ("rollout.num_workers=3", "learner.shards=2")
    run = launch(tmp_path / "run", *TWO, *three, "run.steps=6", f"faults.kill=[{point}]")
    assert run.exit_code == 0, run.output
    assert [line["step"] for line in run.lines] == list(range(7))
    finish(run.dir, run.output, num_branches=num_branches)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_hangs_is_found_and_all_of_them_are_started_again(tmp_path: Path, stopped: int) -> None:
    run_dir, name = tmp_path / "run", ["learner", "learner-1"][stopped]
    with started(
        run_dir, *TWO, "controller.report_wait_s=2", "controller.stall_s=6", "reward.timeout_s=2", "run.steps=100000"
    ) as process:
        wait_for_batch(run_dir, 1, process)
        before, step = processes(run_dir, "learner"), trained_steps(run_dir)
        os.kill(before[stopped], signal.SIGSTOP)
        wait_until(lambda: len(processes(run_dir, "learner")) == 2 and processes(run_dir, "learner") != before, process)
        wait_for_batch(run_dir, step + 4, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 130, output
    assert re.search(rf"controller waits for \S+ since \d+ s: .*; {name}: does not answer\n", output), output
    assert f"{name} is killed and started again" in output
    finish(run_dir, output, num_branches=2)


def test_ranks_killed_while_a_checkpoint_is_written_lose_what_is_promised_and_no_more(tmp_path: Path) -> None:
    run_dir, rng, written = tmp_path / "run", random.Random(0), []
    with started(run_dir, *TWO, "run.steps=100000", "controller.max_restarts=100") as process:
        for number in range(NUM_KILLS):
            written.append(step_being_written(run_dir, process))
            time.sleep(rng.uniform(0, 0.2))
            os.kill(processes(run_dir, "learner")[number % 2], signal.SIGKILL)
            wait_until(lambda number=number: num_branches(run_dir) == number + 2, process)
        wait_for_batch(run_dir, written[-1] + 1, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 130, output
    resumed = [step for (step,) in query(run_dir, "SELECT step FROM branches WHERE branch > 0 ORDER BY branch")]
    last = "SELECT COALESCE(MAX(step), ?) FROM undone_batches WHERE undone_by = ?"
    trained = [query(run_dir, last, step, branch)[0][0] for branch, step in enumerate(resumed, 1)]
    for begun, step, newest in zip(written, resumed, trained, strict=True):
        assert step in (begun - EVERY, begun), "the one before is whole, or this one"
        assert newest - step <= EVERY + max(0, newest - begun)
    print("steps lost:", [newest - step for newest, step in zip(trained, resumed, strict=True)])
    finish(run_dir, output, NUM_KILLS + 1)


def step_being_written(run_dir: Path, process: subprocess.Popen[str]) -> int:
    """Wait until a checkpoint is begun. Returns its step."""
    deadline = time.monotonic() + 240
    while (
        not (names := [path.name for path in (run_dir / "checkpoints").glob(".step-*.new")])
        or names[0][6:12] == "000000"
    ):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return int(names[0][6:12])


def num_branches(run_dir: Path) -> int:
    return query(run_dir, "SELECT COUNT(*) FROM branches")[0][0]


def test_a_learner_that_dies_too_often_ends_the_run_with_the_rank_in_its_last_line(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, *TWO, "run.steps=100000", "controller.max_restarts=0") as process:
        wait_for_batch(run_dir, 1, process)
        os.kill(processes(run_dir, "learner")[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=180)
    assert process.returncode == 1, output
    assert re.search(r"learner-1: the process died.*controller.max_restarts is 0", output.splitlines()[-1]), output
    assert_nothing_lives(run_dir)


def test_synchronous_and_deterministic_two_ranks_make_the_weights_of_one(tmp_path: Path) -> None:
    same = (*SHORT, "replay.run_ahead=0", "rollout.deterministic=true", "learner.updates_per_step=2", "run.steps=2")
    members = "SELECT step, prompt_id FROM groups WHERE step IS NOT NULL ORDER BY step, prompt_id"
    weights, batches = [], []
    for num_ranks in (1, 2):
        run = launch(tmp_path / f"run-{num_ranks}", *same, f"learner.ranks={num_ranks}")
        assert run.exit_code == 0, run.output
        weights.append(load_file(checkpoint_dir(run.dir, 2) / "model.safetensors"))
        batches.append(query(run.dir, members))
    assert batches[0] == batches[1]
    start = load_file(checkpoint_dir(tmp_path / "run-1", 0) / "model.safetensors")
    one, two = weights
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        moved, apart = ((tensor - other[name]).abs().max() for other in (start, two))
        assert moved > 1e-5, name
        assert apart < 0.01 * moved, name


def test_a_run_resumes_with_another_number_of_ranks_and_shards(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    layouts = {3: (2, 2), 6: (4, 2), 9: (1, 1)}
    for steps, (num_ranks, num_shards) in layouts.items():
        layout = (f"learner.ranks={num_ranks}", f"learner.shards={num_shards}")
        run = launch(run_dir, *SHORT, f"run.steps={steps}", *layout)
        assert run.exit_code == 0, run.output
        assert len(processes(run_dir, "learner")) == num_ranks
    assert audit(run_dir) == []
    assert [line["step"] for line in run.lines] == list(range(10))
