"""One small run of the real command through every stage, and what can be read off it afterwards.

It trains with generation as the slow side (few slots), so that weights arrive in the middle of responses; payloads and
a checkpoint of every step are kept; and the model's weight file is removed as soon as the workers run.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
from itertools import product
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncdapo.learner.storage.checkpoint import checkpoint_dir
from tests.controller.recomputed import assert_versions_are_true
from tests.controller.runs import FinishedRun, command, copy_start_model, started, wait_for_step

STEPS = 16
STALENESS = 3
KEYS = """step time/wall_s time/total_s reward/mean reward/filtered_mean filter/kept_ratio replay/staleness_mean
replay/staleness_max replay/queued rollout/tokens_per_s learner/tokens_per_s learner/waiting_ratio learner/loss
learner/grad_norm learner/entropy learner/clip_low_ratio learner/clip_high_ratio weights/publish_s""".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("whole_run")
    model = copy_start_model(folder / "model")
    with started(
        folder / "run",
        f"model.path={model}",
        f"run.steps={STEPS}",
        "rollout.num_workers=2",
        "rollout.slots=4",
        "rollout.group_size=8",
        "rollout.on_update=recompute",
        "replay.run_ahead=3",  # else too little runs when weights arrive
        f"replay.max_staleness={STALENESS}",
        "replay.prompts_per_step=4",
        "replay.keep_payloads=true",
        "learner.lr=1e-3",  # so high that neighbouring versions differ visibly on nearly every response
        "learner.warmup_steps=0",
        "learner.checkpoint_every=1",
        "learner.keep_checkpoints=0",
        "eval.every=6",
        "eval.num_samples=2",
    ) as process:
        wait_for_step(folder / "run", 0, process)
        (model / "model.safetensors").unlink()
        output, _ = process.communicate(timeout=300)
    return FinishedRun(folder / "run", process.returncode, output)


@pytest.mark.timeout(500)
def test_the_run_ends_well_and_its_audit_is_clean(run: FinishedRun) -> None:
    assert run.exit_code == 0, run.output
    audit = subprocess.run(command("audit", str(run.dir)), capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr


def test_workers_open_no_weight_file_after_their_start(run: FinishedRun) -> None:
    """The file was gone before the first train step, and all versions arrived all the same."""
    assert not (run.dir.parent / "model" / "model.safetensors").exists()
    with sqlite3.connect(run.dir / "ledger.db") as ledger:
        loaded = ledger.execute("SELECT worker, MAX(version) FROM loads GROUP BY worker ORDER BY worker").fetchall()
    assert loaded == [(0, STEPS), (1, STEPS)]


def test_there_is_one_metrics_line_a_step_with_the_documented_keys(run: FinishedRun) -> None:
    lines = run.lines
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for line in lines[1:]:
        assert set(KEYS) <= set(line), set(KEYS) - set(line)
    for line in (lines[0], lines[-1]):
        assert {"eval/accuracy", "eval/greedy_accuracy"} <= set(line)
    assert (lines[0]["eval/version_min"], lines[0]["eval/version_max"]) == (0, 0)
    assert (lines[-1]["eval/version_min"], lines[-1]["eval/version_max"]) == (STEPS, STEPS)
    walls = [line["time/wall_s"] for line in lines]
    assert walls == sorted(walls)
    assert (run.dir / "curve.png").stat().st_size > 10_000


def test_the_answers_of_every_evaluation_are_kept_under_the_step_of_its_line(run: FinishedRun) -> None:
    evaluated = {f"step-{line['step']:06.0f}": line for line in run.lines if "eval/accuracy" in line}
    assert len(evaluated) > 2
    assert sorted(path.name for path in (run.dir / "eval").iterdir()) == sorted(evaluated)
    for name, line in evaluated.items():
        answers = [json.loads(row) for row in (run.dir / "eval" / name / "answers.jsonl").read_text().splitlines()]
        sampled = {(one["prompt_id"], one["sample"]): one for one in answers if not one["greedy"]}
        assert sampled.keys() == set(product(range(32), range(2)))
        assert sum(one["greedy"] for one in answers) == (16 if "eval/greedy_accuracy" in line else 0)
        assert fmean(one["acc"] for one in sampled.values()) == pytest.approx(line["eval/accuracy"])
        assert all(one["acc"] == (one["response"].rpartition("Answer: ")[2] == one["answer"]) for one in answers)
        solved = fmean(max(sampled[prompt, 0]["acc"], sampled[prompt, 1]["acc"]) for prompt in range(32))
        assert solved == pytest.approx(line["eval/pass@2"])


def test_weights_are_sent_once_and_whole(run: FinishedRun) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir(run.dir, 0), dtype=torch.float32)
    num_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert {line["weights/bytes"] for line in run.lines[1:]} == {num_bytes}


def test_staleness_is_there_and_within_the_bound(run: FinishedRun) -> None:
    maxima = [line["replay/staleness_max"] for line in run.lines[1:]]
    assert max(maxima) <= STALENESS
    assert sum(worst > 0 for worst in maxima) > STEPS / 2


def test_log_probs_are_those_of_the_recorded_versions(run: FinishedRun) -> None:
    """Versions, rollout_logprobs, temperature and broadcast in one."""
    assert_versions_are_true(run.dir, STEPS, at_least=16)
