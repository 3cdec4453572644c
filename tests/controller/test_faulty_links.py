"""Bad links, a full disk, and death at the worst moments: the run continues, or resumes when it is launched again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asyncdapo.faults import POINTS
from asyncdapo.replay.ledger.audit import audit
from tests.controller.interruptions import SHORT, assert_nothing_lives, query
from tests.controller.runs import FinishedRun, launch

pytestmark = pytest.mark.timeout(300)
BAD_LINKS = (
    "faults.drop=0.03",
    "faults.duplicate=0.05",
    "faults.reorder=0.05",
    "faults.truncate=0.02",
    "faults.delay_s=0.02",
    "replay.heartbeat_s=0.3",
)
DRIVER_POINTS = [f"controller.{point}" for point in POINTS["controller"]]
OTHER_POINTS = [
    f"{'rollout-0' if role == 'rollout' else role}.{point}"
    for role, points in POINTS.items()
    if role != "controller"
    for point in points
]


def assert_sound(run: FinishedRun, num_steps: int) -> None:
    assert run.exit_code == 0, run.output
    assert [line["step"] for line in run.lines] == list(range(num_steps + 1))
    assert audit(run.dir) == []
    assert_nothing_lives(run.dir)


def died(run_dir: Path) -> set[str]:
    """Entries of `faults.kill` that have killed."""
    return {path.name for path in (run_dir / "faults").iterdir()}


@pytest.mark.soak
def test_a_run_trains_over_bad_links_while_its_processes_die_at_the_worst_moments(tmp_path: Path) -> None:
    kills = ("rollout-0.before_send_group:9", "replay.after_commit:60", "learner.in_checkpoint:2")
    run = launch(
        tmp_path / "run", *SHORT, *BAD_LINKS, f"faults.kill=[{','.join(kills)}]", "run.steps=12", timeout_s=200
    )
    assert_sound(run, 12)
    assert died(run.dir) == set(kills)
    assert query(run.dir, "SELECT branch, step FROM branches") == [(0, 0), (1, 0)]
    last = run.lines[-1]
    assert last["replay/malformed"] + last["replay/duplicates"] > 0, "the links were bad"


@pytest.mark.soak
def test_a_full_disk_ends_the_run_in_a_line_and_with_room_it_resumes(tmp_path: Path) -> None:
    run = launch(tmp_path / "run", *SHORT, "run.steps=12", "faults.disk_full_after_mb=20")
    assert run.exit_code == 1, run.output
    ended = r"the run ended: (learner|replay): \S+: can't be written: No space left on device .*free space on this disk"
    assert re.search(ended, run.output.splitlines()[-1]), run.output
    assert "Traceback" not in run.output, run.output
    assert_nothing_lives(run.dir)
    again = launch(tmp_path / "run", *SHORT, "run.steps=12")
    assert "resumes after step" in again.output
    assert_sound(again, 12)


@pytest.mark.soak
@pytest.mark.parametrize("point", OTHER_POINTS)
def test_a_run_outlives_a_death_at_any_point(tmp_path: Path, point: str) -> None:
    kills = {f"{point}:2"}
    if point == "replay.in_roll_back":  # the second death, of which the first makes a rollback
        kills = {point, "learner.after_train:4"}
    run = launch(tmp_path / "run", *SHORT, f"faults.kill=[{','.join(kills)}]", "run.steps=9", timeout_s=200)
    assert_sound(run, 9)
    assert died(run.dir) == kills


@pytest.mark.soak
@pytest.mark.parametrize("point", DRIVER_POINTS)
def test_a_run_resumes_after_its_driver_died_at_any_point(tmp_path: Path, point: str) -> None:
    overrides = (*SHORT, f"faults.kill=[{point}:2]", "run.steps=9")
    assert launch(tmp_path / "run", *overrides).exit_code == -9
    assert_nothing_lives(tmp_path / "run")
    assert_sound(launch(tmp_path / "run", *overrides), 9)
