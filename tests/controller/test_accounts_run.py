"""The accounts of real runs add up, through kills and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncdapo.accounting.names import WORKER_STATES
from asyncdapo.accounting.spans import STATES as TRACK
from asyncdapo.accounting.spans import read
from asyncdapo.controller.watch.trace import step_times
from asyncdapo.metrics.verdict.window import LOOP
from asyncdapo.replay.server.accounts import TOKEN_ENDS, WORKERS_ENDS
from asyncdapo.replay.server.server import STATES
from tests.controller.interruptions import SHORT
from tests.controller.runs import launch

HEARTBEAT_S = 0.25
GROUP_TOKENS = 16 * 128


def loop_s(line: dict[str, Any]) -> float:
    return sum(line[f"controller/{state}_s"] for state in LOOP)


def check_loop(lines: list[dict[str, Any]], wall_before: float = 0.0) -> None:
    """Lines of one launch: states sum to each step, and steps to the training time."""
    for line in lines:
        assert loop_s(line) == pytest.approx(line["time/step_s"], rel=0.01, abs=0.002)
    whole = sum(line["time/step_s"] + line["controller/undone_s"] for line in lines)
    assert whole == pytest.approx(lines[-1]["time/wall_s"] - wall_before, rel=0.01)


def check_tokens(line: dict[str, Any]) -> None:
    """Every token has one end, is held, or is in flight: of leases that run, or of one that is on its way."""
    ends = sum(line[f"replay/tokens_{end}"] for end in (*TOKEN_ENDS, *WORKERS_ENDS, "held", "in_flight"))
    assert ends == line["rollout/tokens"]
    some = 0.01 * line["rollout/tokens"]
    assert -some <= line["replay/tokens_in_flight"] <= (line["replay/running"] + 1) * GROUP_TOKENS + some


def check_spans(run_dir: Path, lines: list[dict[str, Any]]) -> None:
    """What the controller did in a step by its spans is what the step's line says, and so is the step's time."""
    times = step_times(run_dir)
    for line in lines:
        step = times[int(line["step"])]
        spans = read(run_dir, step.began_s, step.ended_s)["controller"][TRACK]
        for state in LOOP:
            spent_s = sum(span.ended_s - span.began_s for span in spans if span.name == state)
            assert spent_s == pytest.approx(line[f"controller/{state}_s"], rel=0.01, abs=0.005)
        assert step.ended_s - step.began_s == pytest.approx(line["time/step_s"], rel=0.01, abs=0.005)


@pytest.mark.soak
@pytest.mark.timeout(500)
def test_the_sums_hold_in_a_run_with_kills_and_resumes(tmp_path: Path) -> None:
    common = (*SHORT, f"replay.heartbeat_s={HEARTBEAT_S}", "rollout.num_workers=2", "learner.checkpoint_every=2")
    kills = "[rollout-0.before_send_group:9, learner.after_train:5, replay.after_commit:60]"
    first = launch(tmp_path, *common, "run.steps=8", f"faults.kill={kills}")
    assert first.exit_code == 0, first.output
    assert len(list((tmp_path / "faults").iterdir())) == 3, first.output
    lines = first.lines[1:]
    check_loop(lines)
    assert max(line["controller/undone_s"] for line in lines) > 0.1, "the learner died once"
    for line in lines:
        check_tokens(line)
    second = launch(tmp_path, *common, "run.steps=14")
    assert second.exit_code == 0, second.output
    resumed = second.lines[9:]
    check_loop(resumed, lines[-1]["time/wall_s"])
    for line in resumed:
        check_tokens(line)
    check_spans(tmp_path, [*lines, *resumed])
    before, after = resumed[0], resumed[-1]
    wall_s = sum(line["time/step_s"] for line in resumed[1:])  # of the last line `time/total_s` has its evaluation, too
    lag_s = 2 * HEARTBEAT_S + 0.01 * wall_s
    workers_s = sum(after[f"rollout/time/{state}_s"] - before[f"rollout/time/{state}_s"] for state in WORKER_STATES)
    assert workers_s == pytest.approx(2 * wall_s, abs=2 * lag_s)
    replay_s = sum(after[f"replay/time/{state}_s"] - before[f"replay/time/{state}_s"] for state in (*STATES, "idle"))
    assert replay_s == pytest.approx(wall_s, abs=lag_s)
