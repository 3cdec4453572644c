"""A run that was stopped or killed goes on as if nothing had happened."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.controller.interruptions import (
    SHORT,
    assert_nothing_lives,
    go_on,
    interrupt,
    some_moment,
    wait_for_batch,
)
from tests.controller.runs import launch, started

pytestmark = pytest.mark.timeout(240)


def test_stopped_by_ctrl_c_a_run_goes_on_from_the_step_it_finished(tmp_path: Path) -> None:
    before = interrupt(tmp_path / "run", signal.SIGINT, 1.0)
    assert before.checkpoint == max(before.trained), "the last step that was done has a checkpoint"
    go_on(tmp_path / "run", before)


def test_a_killed_driver_leaves_nothing_behind_and_a_run_that_goes_on(tmp_path: Path) -> None:
    before = interrupt(tmp_path / "run", signal.SIGKILL, 2.5)
    go_on(tmp_path / "run", before)


@pytest.mark.soak
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_interrupted_at_any_moment_goes_on(tmp_path: Path, sent: signal.Signals, seed: int) -> None:
    before = interrupt(tmp_path / "run", sent, some_moment(seed))
    go_on(tmp_path / "run", before)


def test_a_finished_run_says_so_and_can_be_extended(tmp_path: Path) -> None:
    run = launch(tmp_path / "run", *SHORT, "run.steps=2")
    assert run.exit_code == 0, run.output
    again = launch(tmp_path / "run", *SHORT, "run.steps=2")
    assert again.exit_code == 0, again.output
    assert "raise run.steps" in again.output
    longer = launch(tmp_path / "run", *SHORT, "run.steps=4")
    assert longer.exit_code == 0, longer.output
    assert [line["step"] for line in longer.lines] == [0, 1, 2, 3, 4]
    assert longer.lines[2]["eval/accuracy"] == run.lines[2]["eval/accuracy"]
    assert "eval/accuracy" in longer.lines[4]


def test_ctrl_c_twice_ends_a_run_at_once(tmp_path: Path) -> None:
    with started(tmp_path / "run", *SHORT, "run.steps=100000") as process:
        wait_for_batch(tmp_path / "run", 1, process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=15)
        assert process.returncode == 130, output
    assert_nothing_lives(tmp_path / "run")


def test_synchronous_training_interrupted_and_resumed_gives_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    small = (
        "replay.run_ahead=0",
        "rollout.deterministic=true",
        "rollout.slots=8",
        "rollout.group_size=4",
        "replay.prompts_per_step=2",
        "learner.warmup_steps=0",
        "learner.checkpoint_every=2",
        "eval.num_prompts=4",
        "eval.num_greedy_prompts=4",
    )
    whole = launch(tmp_path / "whole", *small, "run.steps=12")
    assert whole.exit_code == 0, whole.output
    stops = sorted(random.Random(3).sample(range(1, 11), 3))
    for stop in stops:
        with started(tmp_path / "parts", *small, "run.steps=12") as process:
            wait_for_batch(tmp_path / "parts", stop, process)
            process.send_signal(signal.SIGINT if stop % 2 else signal.SIGKILL)
            output, _ = process.communicate(timeout=40)
            assert not re.search("Traceback", output), output
        assert_nothing_lives(tmp_path / "parts")
    parts = launch(tmp_path / "parts", *small, "run.steps=12")
    assert parts.exit_code == 0, parts.output
    weights, again = (load_file(run.dir / "checkpoints/step-000012/model.safetensors") for run in (whole, parts))
    assert weights.keys() == again.keys()
    assert all((weights[name] == again[name]).all() for name in weights)
