"""One small run of the real command through every stage, and what can be read off it afterwards: from its files, and in
Python by the page about it.

It trains with generation as the slow side (paced engines), so that weights arrive in the middle of responses; payloads
and a checkpoint of every step are kept; and the model's weight file is removed as soon as the workers run.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import asyncdapo
from asyncdapo.errors import UserError
from asyncdapo.learner.storage.checkpoint import check_checkpoint, checkpoint_dir
from asyncdapo.replay.ledger.ledger import read_group
from tests.controller import planted
from tests.controller.recomputed import assert_versions_are_true
from tests.controller.runs import FinishedRun, command, copy_start_model, started, wait_for_step
from tests.docs.blocks import python_cells_of

STEPS = 9
NUM_PROMPTS, NUM_GREEDY = 8, 4
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
        "rollout.slots=8",
        f"rollout.engine={planted.__file__}:PacedEngine",
        "rollout.group_size=8",
        "rollout.on_update=recompute",
        "replay.run_ahead=3",
        f"replay.max_staleness={STALENESS}",
        "replay.prompts_per_step=4",
        "replay.keep_payloads=true",
        "learner.lr=1e-3",  # so high that neighbouring versions differ visibly on nearly every response
        "learner.warmup_steps=0",
        "learner.checkpoint_every=1",
        "learner.keep_checkpoints=0",
        "eval.every=5",
        f"eval.num_prompts={NUM_PROMPTS}",
        f"eval.num_greedy_prompts={NUM_GREEDY}",
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
    evaluated = [line for line in lines if "eval/accuracy" in line]
    assert all(line["eval/wall_s"] < line["time/wall_s"] for line in evaluated[1:-1]), "complete before its line is"
    assert all(line["eval/wall_s"] == line["time/wall_s"] for line in (lines[0], lines[-1]))
    assert (run.dir / "curve.png").stat().st_size > 10_000


def test_the_answers_of_every_evaluation_are_kept_under_the_step_of_its_line(run: FinishedRun) -> None:
    evaluated = {f"step-{line['step']:06.0f}": line for line in run.lines if "eval/accuracy" in line}
    assert len(evaluated) > 2
    assert sorted(path.name for path in (run.dir / "eval").iterdir()) == sorted(evaluated)
    for name, line in evaluated.items():
        answers = [json.loads(row) for row in (run.dir / "eval" / name / "answers.jsonl").read_text().splitlines()]
        sampled = {(one["prompt_id"], one["sample"]): one for one in answers if not one["greedy"]}
        assert sampled.keys() == set(product(range(NUM_PROMPTS), range(2)))
        assert sum(one["greedy"] for one in answers) == (NUM_GREEDY if "eval/greedy_accuracy" in line else 0)
        assert fmean(one["acc"] for one in sampled.values()) == pytest.approx(line["eval/accuracy"])
        assert all(one["acc"] == (one["response"].rpartition("Answer: ")[2] == one["answer"]) for one in answers)
        solved = fmean(max(sampled[prompt, 0]["acc"], sampled[prompt, 1]["acc"]) for prompt in range(NUM_PROMPTS))
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
    assert_versions_are_true(run.dir, STEPS, at_least=12)


# ----------------------------------------------------------------------------------------------------------- in Python


@pytest.fixture(scope="module")
def read(run: FinishedRun) -> asyncdapo.Run:
    return asyncdapo.Run(run.dir)


@pytest.fixture(scope="module")
def notebook(read: asyncdapo.Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the cells of docs/python.md leave, where their launch comes to this run."""
    names: dict[str, Any] = {"folder": tmp_path_factory.mktemp("notebook")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(names["folder"])
        patch.setattr(asyncdapo, "launch", lambda config: read)
        for cell in python_cells_of("docs/python.md"):
            exec(cell, names)
    return names


def test_the_page_keeps_only_what_was_trained(notebook: dict[str, Any], read: asyncdapo.Run) -> None:
    assert notebook["kept"]
    assert {group["step"] for group in notebook["kept"]} == {1}
    assert sum(len(read.groups(step)) for step in (1, 2)) <= len(read.groups())


def test_completions_are_what_the_payloads_hold(read: asyncdapo.Run) -> None:
    (group_row, *_), completions = read.groups(1), list(read.completions(1))
    assert len(completions) == sum(row["completions"] for row in read.groups(1))
    group, payload = read_group(read.dir, group_row["group_id"])
    mine = list(read.completions(group_id=group_row["group_id"]))
    assert [completion.sample for completion in mine] == list(range(len(group.completions)))
    assert np.array_equal(np.concatenate([completion.token_ids for completion in mine]), payload.token_ids)
    assert np.array_equal(np.concatenate([completion.logprobs for completion in mine]), payload.logprobs)
    for completion, header in zip(mine, group.completions, strict=True):
        arrays = (completion.token_ids, completion.logprobs, completion.versions, completion.loss_mask)
        assert {len(array) for array in arrays} == {header.num_tokens}
        assert set(completion.versions) == {version for version, _ in header.contexts[0].versions}
        assert (completion.reward, completion.metrics) == (header.reward, header.metrics)
        assert completion.prompt
        assert completion.response
    assert len(list(read.completions())) == sum(row["completions"] for row in read.groups())


def test_an_export_is_a_model_that_others_read(notebook: dict[str, Any], read: asyncdapo.Run) -> None:
    out = notebook["folder"] / notebook["model"]
    assert not {path.name for path in out.iterdir()} & {"learner.pt", "checkpoint.json", "exp_avg", "exp_avg_sq"}
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 100_000
    assert AutoTokenizer.from_pretrained(out).vocab_size > 10
    with pytest.raises(UserError, match="is in use"):
        read.export(out)
    with pytest.raises(UserError, match="no checkpoint of step 77 "):
        read.export(out.with_name("other"), step=77)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(read: asyncdapo.Run, tmp_path: Path) -> None:
    newest, before = (checkpoint_dir(read.dir, step) / "model.safetensors" for step in (STEPS, STEPS - 1))
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    try:
        assert check_checkpoint(newest.parent)
        with pytest.raises(UserError, match="is damaged: model.safetensors has"):
            read.export(tmp_path / "model", step=STEPS)
        assert not (tmp_path / "model").exists()
        with pytest.warns(UserWarning, match=f"{newest.parent.name}: model.safetensors has"):
            read.export(tmp_path / "model")
    finally:
        newest.write_bytes(whole)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before.read_bytes()
