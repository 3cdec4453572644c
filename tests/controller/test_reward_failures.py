"""What a user's verifier may do to a run: raise, hang, end its process, or take the whole worker with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from asyncdapo.replay.ledger.audit import audit
from asyncdapo.replay.ledger.ledger import read_group
from tests.controller.interruptions import SHORT, assert_nothing_lives, query
from tests.controller.runs import FinishedRun, launch

pytestmark = pytest.mark.timeout(600)
VERIFIER = """
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
    if "hang" in answer and len(HUNG.read_text()) < 2:
        HUNG.write_text(HUNG.read_text() + "x")
        time.sleep(60)
    return float(text.rpartition("Answer: ")[2].strip() == answer.split()[0])

def plus_minus_one(text, answer):
    return 1 if text.rpartition("Answer: ")[2].strip() == answer else -1

def always(text, answer):
    raise LookupError("no such answer")
"""


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
    (folder / "hung").touch()
    return [
        "prompts.task=file",
        f"prompts.path={folder / 'train.jsonl'}",
        f"prompts.eval_path={folder / 'eval.jsonl'}",
        'prompts.template="Q: {prompt} mod 10\\n"',
        "prompts.epochs=1",
        "run.steps=100",
    ]


@pytest.mark.soak
def test_a_verdict_outside_0_to_1_ends_the_run_at_once(tmp_path: Path) -> None:
    verifier = f"{tmp_path / 'verifiers.py'}:plus_minus_one"
    run = launch(tmp_path / "run", *SHORT, *write_data(tmp_path, []), f"reward.verifier={verifier}")
    assert run.exit_code == 1
    assert re.fullmatch(
        rf"asyncdapo: the run ended: rollout-0: verifier '{re.escape(verifier)}' broke its contract on eval.jsonl row "
        r"\d+ \(prompt \d+\): a verdict is a number from 0 to 1, got -1 \(return 1 for right and 0 for wrong; .*\)",
        last_line(run),
    ), run.output
    assert "Traceback" not in run.output, run.output
    assert_nothing_lives(run.dir)


@pytest.mark.soak
def test_a_verifier_that_raises_now_and_then_is_said_while_it_happens(tmp_path: Path) -> None:
    data = write_data(tmp_path, ["raise", "", "raise"])
    verifier = f"reward.verifier={tmp_path / 'verifiers.py'}:verify"
    run = launch(tmp_path / "run", *SHORT, *data, verifier, "filter.enabled=false")
    assert run.exit_code == 0, run.output
    notes = [line for line in run.output.splitlines() if "reward warning: the reward function raised on" in line]
    assert notes
    assert all("LookupError: no such answer" in note for note in notes)
    assert sum(line["reward/failed_ratio"] * line["rollout/arrived_groups"] for line in run.lines[1:]) == 2


@pytest.mark.soak
def test_a_verifier_that_fails_on_some_prompts_costs_these_and_no_others(tmp_path: Path) -> None:
    run = launch(
        tmp_path / "run",
        *SHORT,
        *write_data(tmp_path, ["raise", "exit", "hang", "poison"]),
        f"reward.verifier={tmp_path / 'verifiers.py'}:verify",
        "reward.timeout_s=1",
        "filter.enabled=false",
        "replay.keep_payloads=true",
        timeout_s=180,
    )
    assert run.exit_code == 0, run.output
    ends = dict(query(run.dir, "SELECT row, state || ' ' || attempts || ' ' || reason FROM prompts"))
    assert [ends[row] for row in range(4)] == [
        "failed 0 reward",
        "failed 0 reward",
        "trained 0 ",
        "failed 3 worker lost",
    ]
    assert sum(end.startswith("failed") for end in ends.values()) == 3, "nobody else failed"
    assert sum(end.startswith("trained") for end in ends.values()) > 140
    details = [detail for (detail,) in query(run.dir, "SELECT detail FROM events WHERE kind = 'failed' ORDER BY pos")]
    assert any("LookupError: no such answer" in detail for detail in details), details
    assert any("ended with exit code 3" in detail for detail in details), details
    ((hung,),) = query(run.dir, "SELECT group_id FROM groups JOIN prompts USING (prompt_id) WHERE row = 2")
    group, _ = read_group(run.dir, hung)
    assert [completion.metrics["timed_out"] for completion in group.completions] == [1.0] + [0.0] * 15
    assert group.completions[0].reward == -1.0
    assert (tmp_path / "hung").read_text() == "xx", "tried twice, each time in a process of its own"
    assert audit(run.dir) == []
    assert_nothing_lives(run.dir)


@pytest.mark.soak
def test_a_verifier_that_always_raises_ends_the_run_with_its_words(tmp_path: Path) -> None:
    run = launch(
        tmp_path / "run", *SHORT, *write_data(tmp_path, []), f"reward.verifier={tmp_path / 'verifiers.py'}:always"
    )
    assert run.exit_code == 1
    assert re.search(r"the run ended: .*reward.max_failure_ratio: .*LookupError: no such answer", last_line(run)), run
    assert "Traceback" not in run.output, run.output
    assert_nothing_lives(run.dir)


def last_line(run: FinishedRun) -> str:
    return run.output.splitlines()[-1]
