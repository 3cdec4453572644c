"""A whole run that measures its run-ahead and leaves out solved rows, stopped half way."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.controller.interruptions import query
from tests.controller.runs import command, launch
from tests.controller.test_mixture_runs import write_chains

RETIRED = "SELECT prompt_id, row, changed_pos FROM prompts WHERE state = 'retired'"
LAST_TWO = (
    "SELECT acc_mean FROM groups JOIN prompts USING (prompt_id) WHERE row = ? AND arrived_pos <= ?"
    " ORDER BY prompt_id DESC LIMIT 2"
)


@pytest.mark.soak
def test_run_ahead_and_solved_rows_continue_after_a_resume(tmp_path: Path) -> None:
    """They go by the ledger alone: each row left out was solved in the two epochs before."""
    keys = (
        "prompts.task=file",
        f"prompts.path={write_chains(tmp_path / 'chains.jsonl', 56, seed=1)}",
        "prompts.retire_above=0.5",
        "replay.run_ahead=auto",
        "replay.on_stale=auto",
        "replay.prompts_per_step=8",
        "rollout.group_size=8",
        "eval.num_prompts=8",
        "eval.num_greedy_prompts=4",
    )
    run_dir = tmp_path / "run"
    for steps in (6, 14):
        run = launch(run_dir, *keys, f"run.steps={steps}")
        assert run.exit_code == 0, run.output
    counted = [line["replay/retired_rows"] for line in run.lines if line["step"]]
    assert counted == sorted(counted)
    assert counted[5] <= counted[6], "none came back"
    retired = query(run_dir, RETIRED)
    assert retired
    for _, row, position in retired:
        shares = [share for (share,) in query(run_dir, LAST_TWO, row, position)]
        assert len(shares) == 2
        assert min(shares) > 0.5
    assert all(0 < line["replay/run_ahead"] <= 2 for line in run.lines if line["step"])
    assert subprocess.run(command("audit", str(run_dir)), capture_output=True, check=False).returncode == 0
