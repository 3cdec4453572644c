"""What a user's verifier may do to a run: raise, hang, end its process, or take the whole worker with it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from asyncdapo.replay.audit import audit
from asyncdapo.replay.ledger import read_group
from tests.controller.interruptions import SHORT, assert_nothing_lives, query
from tests.controller.runs import FinishedRun, launch

VERIFIER = '''
import os, signal, time
from pathlib import Path

HUNG = Path(__file__).with_name("hung")

def verify(text, answer):
    if "raise" in answer:
        raise LookupError("no such answer")
    if "exit" in answer:
        os._exit(3)
    if "poison" in answer:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if "hang" in answer and (not HUNG.exists() or HUNG.read_text() == text):
        HUNG.write_text(text)
        time.sleep(60)
    return float(text.rpartition("Answer: ")[2].strip() == answer.split()[0])

def always(text, answer):
    raise LookupError("no such answer")
'''


def write_data(folder: Path, odd: list[str]) -> list[str]:
    """Question files for training and evaluation. The answers of the first training rows have an `odd` word behind
    them. Returns what to override."""
    pairs = [(f"{a}+{b}*{c}", (a + b * c) % 10) for a in range(6) for b in range(1, 6) for c in range(2, 8)]
    held_out, training = pairs[::9], [pair for index, pair in enumerate(pairs) if index % 9]
    words = odd + [""] * (len(training) - len(odd))
    for name, rows in (
        ("train", [(question, f"{answer} {word}") for (question, answer), word in zip(training, words, strict=True)]),
        ("eval", [(question, str(answer)) for question, answer in held_out]),
    ):
        lines = [json.dumps({"prompt": question, "answer": answer}) + "\n" for question, answer in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "verifiers.py").write_text(VERIFIER)
    return [
        "prompts.task=file",
        f"prompts.path={folder / 'train.jsonl'}",
        f"prompts.eval_path={folder / 'eval.jsonl'}",
        'prompts.template="Q: {prompt} mod 10\\n"',
        "prompts.epochs=1",
        "run.steps=100",
    ]


def ends(run: FinishedRun, row: int) -> list[tuple[str, int, str]]:
    """State, attempts and reason of the prompts of a row."""
    return query(run.dir, "SELECT state, attempts, reason FROM prompts WHERE row = ?", row)


@pytest.mark.timeout(200)
def test_a_verifier_that_fails_on_some_prompts_costs_these_and_no_others(tmp_path: Path) -> None:
    odd = ["raise", "exit", "hang", "poison"]
    run = launch(
        tmp_path / "run",
        *SHORT,
        *write_data(tmp_path, odd),
        f"reward.verifier={tmp_path / 'verifiers.py'}:verify",
        "reward.timeout_s=1",
        "prompts.max_attempts=2",
        "filter.enabled=false",
        "replay.keep_payloads=true",
        timeout_s=180,
    )
    assert run.exit_code == 0, run.output
    assert audit(run.dir) == []
    assert_nothing_lives(run.dir)
    print(query(run.dir, "SELECT state, attempts, reason, COUNT(*) FROM prompts GROUP BY 1,2,3"))
    for row in range(5):
        print(row, ends(run, row), query(run.dir, "SELECT attempt, outcome, reason FROM leases JOIN prompts USING (prompt_id) WHERE row = ?", row))
    assert 0
