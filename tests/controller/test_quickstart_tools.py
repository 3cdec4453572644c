"""`quickstart_tools`, whole: what the model learns with a calculator, and with one that answers other questions."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from asyncdapo.environment.calculator import PRODUCT
from tests.controller.runs import FinishedRun, command, launch

WHOLE = ("eval.num_prompts=470", "eval.num_greedy_prompts=256", "learner.checkpoint_every=8")
"""As the config has it: `launch` sets smaller values."""
LAST = "step-000016"


def asked_ratio(run: FinishedRun) -> float:
    """Share of the episodes of the last evaluation that begin with a product."""
    lines = (run.dir / "eval" / LAST / "answers.jsonl").read_text().splitlines()
    responses = [json.loads(line)["response"] for line in lines]
    return sum(PRODUCT.match(response) is not None for response in responses) / len(responses)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(1, 6))
def test_the_model_learns_to_ask_the_calculator_and_to_believe_it(seed: int, tmp_path: Path) -> None:
    run = launch(tmp_path / "run", f"run.seed={seed}", *WHOLE, config="quickstart_tools", timeout_s=500)
    assert run.exit_code == 0, run.output
    first, *steps = run.lines
    last = steps[-1]
    for name in ("eval/accuracy", "eval/greedy_accuracy"):
        print(f"seed {seed}: {name} {first[name]:.3f} to {last[name]:.3f}")
    print(f"asked {asked_ratio(run):.3f}, training {last['time/total_s'] - first['time/total_s']:.0f} s")
    assert first["eval/accuracy"] <= 0.2
    assert first["eval/greedy_accuracy"] <= 0.2
    assert last["eval/accuracy"] >= 0.9
    assert last["eval/greedy_accuracy"] >= 0.95
    assert sum(line["replay/staleness_mean"] > 0 for line in steps) > len(steps) / 2
    assert asked_ratio(run) >= 0.9
    audit = subprocess.run(command("audit", str(run.dir)), capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_nothing_is_learned_from_a_calculator_that_answers_other_questions(tmp_path: Path) -> None:
    shuffled = Path(__file__).parents[1] / "environment" / "shuffled.py"
    run = launch(
        tmp_path / "run",
        f"environment.path={shuffled}:ShuffledCalculator",
        "filter.enabled=false",  # or no group would ever be kept
        *WHOLE,
        config="quickstart_tools",
        timeout_s=500,
    )
    assert run.exit_code == 0, run.output
    assert max(line["eval/accuracy"] for line in run.lines if "eval/accuracy" in line) <= 0.02
