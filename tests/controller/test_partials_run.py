"""Runs whose half-sampled groups are continued: by another worker, after a rollback, and by the next launch.

Every completion that was continued is held to the weights of its recorded versions: before and behind the place where
it changed hands.
"""

from __future__ import annotations

import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

from asyncdapo.replay.ledger.audit import audit
from tests.controller import planted
from tests.controller.interruptions import assert_nothing_lives, processes, query, survey, wait_for_batch, wait_until
from tests.controller.recomputed import num_shifted_apart, recorded_contexts
from tests.controller.runs import launch, started

pytestmark = pytest.mark.soak

VLLM = pytest.param("vllm", marks=pytest.mark.vllm)
SLOW = pytest.param(f"{planted.__file__}:SlowEngine", id="torch")
SLOW_ANSWERS = (
    "rollout.group_size=64",
    "rollout.on_update=recompute",
    "replay.prompts_per_step=2",
    "replay.run_ahead=1",
    "replay.max_staleness=4",
    "replay.keep_payloads=true",
    "learner.lr=1e-3",  # so high that neighbouring versions differ visibly on nearly every response
    "learner.warmup_steps=0",
    "learner.checkpoint_every=1",
    "learner.keep_checkpoints=0",
    "replay.heartbeat_s=0.5",
    "eval.every=0",
    "eval.num_prompts=4",
    "eval.num_greedy_prompts=4",
)
TWO_WORKERS = ("rollout.num_workers=2", "rollout.slots=65", "replay.prompts_per_step=4")
"""Each samples two groups at once."""
NUM_WHOLE_FLEET = 4
"""Groups that run then."""
CONTINUED = """
SELECT events.number, leases.outcome, leases.lease_id, leases.worker
FROM events JOIN leases USING (lease_id) WHERE kind = 'continued'
"""


def assert_exact(run_dir: Path, group_ids: set[int], last_version: int) -> None:
    """Log-probs of continued groups fit the recorded versions, and not those next to them, unless an answer is
    certain."""
    contexts = [one for one in recorded_contexts(run_dir, last_version) if one.completion[0] in group_ids]
    spanning = [one for one in contexts if one.spans]
    checked = [one for one in contexts if not one.spans][:32] + spanning
    num_apart = num_shifted_apart(run_dir, last_version, checked)
    print(f"{len(checked)} completions checked, {len(spanning)} of several versions; {num_apart} fit no others")
    assert spanning, "none changed hands between two versions"
    assert num_apart >= 0.8 * len(checked)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", [SLOW, VLLM])
def test_after_ctrl_c_the_same_command_continues_what_was_sampled(engine: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    own = (*SLOW_ANSWERS, *TWO_WORKERS, f"rollout.engine={engine}", "rollout.save_partials_s=null")
    with started(run_dir, *own, "run.steps=100000") as process:
        wait_for_batch(run_dir, 3, process)
        wait_until(partial(waits_for_groups, run_dir, NUM_WHOLE_FLEET), process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 130, output
    assert_nothing_lives(run_dir)
    assert query(run_dir, "SELECT COUNT(*) FROM prompts WHERE state = 'leased'") == [(0,)], "all were handed back"
    [(num_groups, num_saved)] = query(run_dir, "SELECT COUNT(*), SUM(tokens) FROM partials")
    last = survey(run_dir).checkpoint + 6
    run = launch(run_dir, *own, f"run.steps={last}")
    assert run.exit_code == 0, run.output
    continued = query(run_dir, CONTINUED)
    num_used = sum(number for number, outcome, *_ in continued if outcome == "done")
    [(num_stale,)] = query(
        run_dir, "SELECT COALESCE(SUM(number), 0) FROM events WHERE kind = 'partial_dropped' AND detail = 'stale'"
    )
    print(f"{engine}: {num_groups} groups, {num_saved} tokens saved; {num_used} used, {num_stale} too old")
    assert num_groups >= NUM_WHOLE_FLEET
    assert num_used >= 0.95 * (num_saved - num_stale)
    assert audit(run_dir) == []
    assert_exact(run_dir, {lease_id for _, outcome, lease_id, _ in continued if outcome == "done"}, last)


@pytest.mark.timeout(900)
def test_a_rollback_keeps_what_older_weights_have_sampled_and_drops_the_rest(tmp_path: Path) -> None:
    """The learner dies twice: while version 3 is in use and its checkpoint hasn't its name yet, and between steps. The
    workers have enough to sample until it is there again."""
    steps, run_dir = 8, tmp_path / "run"
    engine = f"rollout.engine={planted.__file__}:SlowEngine"
    slow = (engine, "rollout.num_workers=2", "rollout.slots=8", "replay.run_ahead=4")
    own = (*slow, "rollout.save_partials_s=null", "faults.kill=[learner.in_checkpoint:4]", f"run.steps={steps}")
    with started(run_dir, *SLOW_ANSWERS, *own) as process:
        wait_for_batch(run_dir, 1, process)
        wait_until(lambda: num_branches(run_dir) == 2, process)
        wait_for_batch(run_dir, 4, process)
        wait_until(lambda: waits_for_groups(run_dir, 2) and can_go_back_to_weights_in_use(run_dir), process)
        os.kill(processes(run_dir, "learner")[0], signal.SIGKILL)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
    dropped, kept = [
        dict(query(run_dir, f"SELECT branch, SUM(number) FROM events WHERE {which} GROUP BY 1"))
        for which in ("kind = 'partial_dropped' AND detail = 'rolled back'", "kind = 'continued'")
    ]
    print(f"tokens dropped {dropped}, continued {kept}, by branch")
    assert num_branches(run_dir) == 3
    assert dropped.keys() == {1}
    assert 2 in kept
    assert audit(run_dir) == []
    done = {lease_id for _, outcome, lease_id, _ in query(run_dir, CONTINUED) if outcome == "done"}
    assert_exact(run_dir, done, steps)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("engine", "slots"), [pytest.param(*SLOW.values, 16, id="torch"), pytest.param("vllm", 8, marks=pytest.mark.vllm)]
)
def test_what_workers_leave_behind_others_continue_and_it_is_trained(engine: str, slots: int, tmp_path: Path) -> None:
    """A group takes seconds, so the learner waits, and something is always half sampled."""
    steps, run_dir = 18, tmp_path / "run"
    own = ("rollout.num_workers=2", "rollout.drain_s=0.3", "rollout.save_partials_s=0.2", f"rollout.engine={engine}")
    with started(run_dir, *SLOW_ANSWERS, *own, f"rollout.slots={slots}", f"run.steps={steps}") as process:
        for step, sent in ((2, signal.SIGTERM), (7, signal.SIGKILL), (12, signal.SIGTERM)):
            wait_for_batch(run_dir, step, process)
            num_before = num_continued(run_dir)
            wait_until(partial(holders, run_dir), process)
            worker = (holders(run_dir) or [0])[0]
            os.kill(processes(run_dir, "rollout")[worker], sent)
            wait_until_continued(run_dir, num_before, process)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    ends = dict(query(run_dir, "SELECT reason, COUNT(*) FROM leases WHERE outcome IN ('withdrawn', 'lost') GROUP BY 1"))
    continued = query(run_dir, CONTINUED)
    trained = {group_id for (group_id,) in query(run_dir, "SELECT group_id FROM groups WHERE state = 'trained'")}
    done = {lease_id for _, outcome, lease_id, _ in continued if outcome == "done"}
    print(f"{engine}: leases ended {ends}; continued {len(continued)}, {len(done & trained)} of them trained on")
    assert ends["handed back"]
    assert ends["worker lost"]
    assert done & trained
    assert audit(run_dir) == []
    assert_exact(run_dir, done, steps)


def waits_for_groups(run_dir: Path, num: int) -> bool:
    """So many are half sampled, and the learner has no batch: a run that is asked to stop ends at once."""
    begun = "SELECT 1 FROM leases WHERE outcome IS NULL AND started_version IS NOT NULL"
    cut = "SELECT 1 FROM prompts WHERE state = 'cut'"
    return len(query(run_dir, begun)) >= num and not query(run_dir, cut)


def can_go_back_to_weights_in_use(run_dir: Path) -> bool:
    return query(run_dir, "SELECT MAX(version) FROM publishes") == [(survey(run_dir).checkpoint,)]


def num_branches(run_dir: Path) -> int:
    """1 before any rollback."""
    return query(run_dir, "SELECT COUNT(*) FROM branches")[0][0]


def holders(run_dir: Path) -> list[int]:
    """Workers of whose running leases something is saved, the least first: it isn't done before they leave."""
    saved = "SELECT worker FROM partials JOIN leases USING (lease_id) WHERE outcome IS NULL ORDER BY tokens"
    rows = query(run_dir, saved)
    return [worker for (worker,) in rows]


def num_continued(run_dir: Path) -> int:
    return query(run_dir, "SELECT COUNT(*) FROM events WHERE kind = 'continued'")[0][0]


def wait_until_continued(run_dir: Path, num_before: int, process: subprocess.Popen[str]) -> None:
    wait_until(lambda: num_continued(run_dir) > num_before, process, timeout_s=60)
