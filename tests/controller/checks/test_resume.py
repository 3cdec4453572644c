"""A run that was stopped or killed resumes as if nothing had happened."""

from __future__ import annotations

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

pytestmark = pytest.mark.timeout(600)


@pytest.mark.soak
def test_stopped_and_then_killed_a_run_resumes_each_time_and_says_when_it_is_finished(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stopped = interrupt(run_dir, signal.SIGINT, 1.0)
    assert stopped.checkpoint == max(stopped.trained), "the last step that was done has a checkpoint"
    killed = interrupt(run_dir, signal.SIGKILL, 2.5)
    assert killed.checkpoint >= stopped.checkpoint
    finished = go_on(run_dir, killed)
    again = launch(run_dir, *SHORT, f"run.steps={finished.lines[-1]['step']:.0f}")
    assert again.exit_code == 0, again.output
    assert "raise run.steps to continue" in again.output


@pytest.mark.soak
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_interrupted_at_any_moment_resumes(tmp_path: Path, sent: signal.Signals, seed: int) -> None:
    before = interrupt(tmp_path / "run", sent, some_moment(seed))
    go_on(tmp_path / "run", before)


@pytest.mark.soak
def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    run = launch(tmp_path / "run", *SHORT, "run.steps=2")
    assert run.exit_code == 0, run.output
    longer = launch(tmp_path / "run", *SHORT, "run.steps=4")
    assert longer.exit_code == 0, longer.output
    assert [line["step"] for line in longer.lines] == [0, 1, 2, 3, 4]
    assert longer.lines[2]["eval/accuracy"] == run.lines[2]["eval/accuracy"]
    assert "eval/accuracy" in longer.lines[4]


@pytest.mark.soak
def test_ctrl_c_twice_ends_a_run_at_once(tmp_path: Path) -> None:
    with started(tmp_path / "run", *SHORT, "run.steps=100000") as process:
        wait_for_batch(tmp_path / "run", 1, process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=15)
        assert process.returncode == 130, output
    assert_nothing_lives(tmp_path / "run")


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "stops",
    [
        [(2, signal.SIGINT), (5, signal.SIGKILL), (9, signal.SIGINT)],
        [(3, signal.SIGKILL), (4, signal.SIGINT), (10, signal.SIGKILL)],
    ],
)
def test_synchronous_training_interrupted_and_resumed_gives_the_same_weights_bit_for_bit(
    tmp_path: Path, stops: list[tuple[int, signal.Signals]]
) -> None:
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
    for step, sent in stops:
        with started(tmp_path / "parts", *small, "run.steps=12") as process:
            wait_for_batch(tmp_path / "parts", step, process)
            process.send_signal(sent)
            output, _ = process.communicate(timeout=120)
            assert "Traceback" not in output, output
        assert_nothing_lives(tmp_path / "parts")
    parts = launch(tmp_path / "parts", *small, "run.steps=12")
    assert parts.exit_code == 0, parts.output
    assert "resumes after step" in parts.output
    weights, again = (load_file(run.dir / "checkpoints/step-000012/model.safetensors") for run in (whole, parts))
    assert weights.keys() == again.keys()
    assert all((weights[name] == again[name]).all() for name in weights)
