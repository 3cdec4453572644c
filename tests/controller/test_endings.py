"""How runs on a user's own data go, and how they end when it is used up."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.controller.runs import command, launch

pytestmark = [pytest.mark.soak, pytest.mark.timeout(400)]


def write_questions(path: Path, num: int = 50) -> None:
    """Question and answer pairs like a user's own, in the words of the start model's task."""
    pairs = [(f"{a}+{b}*{c}", (a + b) * c % 10) for a in range(4) for b in range(4) for c in range(2, 6)]
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs[:num]))


def test_synchronous_training_ends_well_at_the_end_of_prepared_data_with_staleness_0(tmp_path: Path) -> None:
    write_questions(tmp_path / "questions.jsonl", num=20)
    words = ("data", "prepare", "questions.jsonl", "--out", "data", "--template", "Q: {prompt} mod 10\n")
    prepared = subprocess.run(command(*words), cwd=tmp_path, capture_output=True, text=True, check=True)
    [keys] = [line.split() for line in prepared.stdout.splitlines() if "prompts.path=" in line]
    run = launch(
        tmp_path / "run",
        "run.steps=100",
        "replay.run_ahead=0",
        "replay.prompts_per_step=4",
        *(key.replace("prompts.path=", f"prompts.path={tmp_path}/") for key in keys),
        "prompts.epochs=1",
        "filter.enabled=false",
        "eval.num_prompts=4",
        "eval.num_greedy_prompts=4",
    )
    assert run.exit_code == 0, run.output
    assert "replay.max_staleness is 0 in force" in run.output
    assert [line["step"] for line in run.lines] == [0, 1, 2, 3, 4]  # 16 prompts left for training
    assert [line["replay/staleness_max"] for line in run.lines[1:]] == [0, 0, 0, 0]
    assert "eval/greedy_accuracy" in run.lines[-1]
    assert (run.dir / "checkpoints" / "step-000004").is_dir()
    assert not (run.dir / "ledger.db-wal").exists() or (run.dir / "ledger.db-wal").stat().st_size < 100_000
    assert subprocess.run(command("audit", str(run.dir)), check=False, capture_output=True).returncode == 0
