"""`asyncdapo eval` with real processes: it agrees with the run's own curve, and outlives deaths and interruptions."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from asyncdapo.controller.process.roster import read as read_roster
from asyncdapo.learner.storage.checkpoint import checkpoint_dir
from asyncdapo.metrics.jsonl import read_metrics
from asyncdapo.model.files import WHOLE
from tests.controller.runs import START_MODEL, command, launch

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of the quickstart."""
    run_dir = tmp_path_factory.mktemp("quickstart") / "run"
    launch = command("launch", "quickstart", f"run.dir={run_dir}", "metrics.wandb=disabled")
    subprocess.run(launch, check=True, capture_output=True, timeout=400)
    return run_dir


def evaluate(checkpoint: Path, out: Path, *args: str) -> str:
    """Run the command to its end. Returns what it printed."""
    whole = command("eval", str(checkpoint), "--out", str(out), *args)
    result = subprocess.run(whole, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def start(checkpoint: Path, out: Path, *args: str) -> subprocess.Popen[str]:
    """Begin the command, and return when some answers are there."""
    whole = command("eval", str(checkpoint), "--out", str(out), *args)
    process = subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not ((out / "answers.jsonl").exists() and (out / "answers.jsonl").stat().st_size):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def pid_of(out: Path, name: str) -> int | None:
    """None while it is being started."""
    return next((entry.pid for entry in read_roster(out) if entry.name == name), None)


def answers_in(out: Path) -> dict[tuple, dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    by_key = {(line["prompt_id"], line["sample"], line["greedy"]): line for line in lines}
    assert len(by_key) == len(lines), "an answer is there twice"
    return by_key


def responses_in(out: Path) -> dict[tuple, str]:
    return {key: line["response"] for key, line in answers_in(out).items()}


def test_a_judge_that_is_down_gives_no_numbers_and_its_answers_are_asked_for_again(tmp_path: Path) -> None:
    judge, up, out = tmp_path / "judge.py", tmp_path / "up", tmp_path / "out"
    judge.write_text(
        "import pathlib\n\ndef judge(text, answer):\n"
        f"    if not pathlib.Path({str(up)!r}).exists():\n        raise OSError('no connection')\n    return 1.0\n"
    )
    keys = [
        "--config",
        "quickstart",
        "eval.num_prompts=8",
        "eval.num_greedy_prompts=4",
        f"reward.verifier={judge}:judge",
    ]
    whole = command("eval", str(START_MODEL), "--out", str(out), *keys)
    down = subprocess.run(whole, capture_output=True, text=True, timeout=300, check=False)
    assert down.returncode == 1
    assert "reward.max_failure_ratio allows 50%, and 12 of 12 answers weren't judged" in down.stderr
    assert not (out / "metrics.json").exists()
    up.touch()
    assert "accuracy 1.000" in evaluate(START_MODEL, out, *keys)
    assert len(answers_in(out)) == 12


@pytest.mark.parametrize(("step", "place"), [(0, 0), (36, -1)])
def test_the_first_and_the_last_checkpoint_are_as_good_as_the_runs_own_curve_says(
    quickstart: Path, tmp_path: Path, step: int, place: int
) -> None:
    own = read_metrics(quickstart)[place]
    assert own["step"] == step
    seed = "run.seed=1"  # other problems, so that both standard errors count
    evaluate(
        quickstart / "checkpoints" / f"step-{step:06d}", tmp_path, "--samples", "4", "eval.num_greedy_prompts=0", seed
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    difference = metrics["eval/accuracy"] - own["eval/accuracy"]
    assert abs(difference) <= 3 * math.hypot(metrics["eval/accuracy_stderr"], own["eval/accuracy_stderr"])
    assert metrics["eval/pass@4"] >= metrics["eval/accuracy"]
    assert metrics["eval/version_min"] == metrics["eval/version_max"] == step


def test_the_same_samples_of_the_same_weights_are_the_runs_own_answers(quickstart: Path, tmp_path: Path) -> None:
    printed = evaluate(quickstart, tmp_path)
    assert responses_in(tmp_path) == responses_in(quickstart / "eval" / "step-000036")
    assert "sampled: 512 answers to 512 prompts" in printed
    assert "greedy: 256 answers to 256 prompts" in printed
    assert "has all its answers" in evaluate(quickstart, tmp_path)
    assert not list(tmp_path.glob("ledger*"))


def test_run_checkpoint_and_export_of_two_shards_have_the_same_answers(tmp_path: Path) -> None:
    few = ("eval.num_prompts=64", "eval.num_greedy_prompts=32", "replay.prompts_per_step=4")
    run = launch(tmp_path / "run", *few, "learner.ranks=2", "learner.shards=2", "run.steps=3")
    assert run.exit_code == 0, run.output
    checkpoint, exported = checkpoint_dir(run.dir, 3), tmp_path / "model"
    subprocess.run(command("export", str(checkpoint), "--out", str(exported)), check=True, capture_output=True)
    assert (exported / WHOLE).read_bytes() == (checkpoint / WHOLE).read_bytes()
    recorded = responses_in(run.dir / "eval" / "step-000003")
    assert len(recorded) == 64 + 32
    assert recorded != responses_in(run.dir / "eval" / "step-000000"), "the weights are the trained ones"
    evaluate(checkpoint, tmp_path / "of checkpoint")
    evaluate(exported, tmp_path / "of export", "--config", "quickstart", *few[:2])
    assert responses_in(tmp_path / "of checkpoint") == recorded
    assert responses_in(tmp_path / "of export") == recorded


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_evaluation_resumes_with_what_is_missing(quickstart: Path, tmp_path: Path, sent: int) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    args = ("--samples", "4", "eval.num_prompts=128", "eval.num_greedy_prompts=512")
    process = start(quickstart, out, *args)
    process.send_signal(sent)
    printed, _ = process.communicate(timeout=60)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command resumes" in printed
    before = responses_in(out)
    with (out / "answers.jsonl").open("a") as file:
        file.write('{"prompt_id":1,"torn')
    printed = evaluate(quickstart, out, *args)
    assert f"resumes: {len(before):,} of 1,024 answers are there" in printed
    after = responses_in(out)
    assert before.items() <= after.items()
    evaluate(quickstart, whole, *args)
    assert after == responses_in(whole)


def test_processes_that_die_or_hang_are_started_again_and_no_answer_is_lost(quickstart: Path, tmp_path: Path) -> None:
    args = ("--samples", "16", "controller.stall_s=25", "reward.timeout_s=5", "eval.num_greedy_prompts=512")
    process = start(quickstart, tmp_path, *args)
    signals = {"replay": signal.SIGKILL, "rollout-0": signal.SIGSTOP}
    for name, sent in signals.items():
        pid = pid_of(tmp_path, name)
        subprocess.run(["kill", f"-{int(sent)}", str(pid)], check=True)
        deadline = time.monotonic() + 120
        while pid_of(tmp_path, name) in (pid, None):
            assert time.monotonic() < deadline, f"{name} was not started again"
            time.sleep(0.5)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert len(answers_in(tmp_path)) == 16 * 512 + 512
