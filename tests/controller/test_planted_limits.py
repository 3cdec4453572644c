"""Planted bottlenecks: a real run gets the verdict that was planted, and is faster once its advice is followed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from asyncdapo.config.config import load_config
from asyncdapo.metrics.verdict.advice import Advice, advise, keys_in_force
from asyncdapo.metrics.verdict.verdict import Verdict, judge, lost_shares
from asyncdapo.metrics.verdict.window import Window
from tests.controller.runs import FinishedRun, launch

PLANTS = Path(__file__).with_name("planted.py")
SMALL_STEPS = (
    "run.steps=10",
    "eval.every=100",
    "eval.num_prompts=8",
    "eval.num_greedy_prompts=4",
    "rollout.slots=32",
    "rollout.group_size=8",
    "rollout.max_response_length=64",
    "rollout.parity_every=0",
    "replay.prompts_per_step=8",
    "replay.heartbeat_s=0.5",
)


@dataclass(frozen=True)
class Plant:
    """What is planted, the verdicts that it may get, and what is changed if the advice names no number."""

    overrides: tuple[str, ...]
    limits: tuple[str, ...]
    instead: tuple[str, ...] = ()


PLANTED = {
    "slow engine": Plant((f"rollout.engine={PLANTS}:SlowEngine", "rollout.slots=16"), ("rollout",)),
    "slow learner": Plant(("learner.tokens_per_microbatch=128", "learner.epochs=4"), ("learner",)),
    "slow verifier": Plant((f"reward.verifier={PLANTS}:slow_verdict",), ("reward",)),
    "slow publish": Plant((f"rollout.engine={PLANTS}:SlowToLoad",), ("publish",)),
    "slow link": Plant(("faults.delay_s=2",), ("transport", "run_ahead")),
    "a straggler": Plant(
        ("rollout.num_workers=2", "faults.slow_worker_s=3"), ("straggler",), ("faults.slow_worker_s=0",)
    ),
    "all right": Plant((f"reward.verifier={PLANTS}:nearly_all_right",), ("data",), ("reward.verifier=answer",)),
    "all wrong": Plant((f"reward.verifier={PLANTS}:nearly_all_wrong",), ("data",), ("reward.verifier=answer",)),
}


@dataclass(frozen=True)
class Judged:
    """A run and its verdict on all steps but the first."""

    run: FinishedRun
    window: Window
    verdict: Verdict
    advice: Advice | None = field(default=None)

    @property
    def group_s(self) -> float:
        """Time of a step for each of its groups: advice may change how many a step has."""
        return self.window.step_s / self.run.lines[-1]["replay/trained_groups"]


def judged(run_dir: Path, *overrides: str) -> Judged:
    run = launch(run_dir, *SMALL_STEPS, *overrides)
    assert run.exit_code == 0, run.output
    window = Window.of([line for line in run.lines if line["step"] > 0])
    assert window is not None
    verdict = judge(lost_shares(window))
    keys = keys_in_force(load_config(run_dir / "config.yaml", []))
    return Judged(run, window, verdict, advise(verdict, window, keys))


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_bottleneck_is_found_and_the_advice_against_it_helps(tmp_path: Path, planted: str) -> None:
    plant = PLANTED[planted]
    before = judged(tmp_path / "before", *plant.overrides)
    assert before.verdict.limit in plant.limits, before.run.output[-2000:]
    assert before.advice is not None
    changes = [f"{key}={value:g}" for key, value in before.advice.changes.items()]
    after = judged(tmp_path / "after", *plant.overrides, *(plant.instead or changes))
    print(f"{planted}: {before.verdict}; {before.advice.text}")
    print(f"{planted}: a group takes {before.group_s:.3f} s, and {after.group_s:.3f} s with {plant.instead or changes}")
    assert after.group_s < before.group_s
