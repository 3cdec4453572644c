"""What a run does now, read from its files alone: live, over, resumed, half written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncdapo.controller.process.roster import Entry, Roster, entry_of
from asyncdapo.controller.watch.run_state import FINISHED, OVER, RUNNING, RunState, last_lines
from asyncdapo.errors import UserError
from asyncdapo.metrics.jsonl import FILE_NAME, MetricsFile
from tests.controller.living import living
from tests.controller.watch.run_files import bound_by_learner, run_files
from tests.replay.small_run import finished_run


def state_of(run_dir: Path) -> RunState:
    run = RunState(run_dir)
    run.update()
    return run


def test_a_run_is_running_as_long_as_its_controller_lives(tmp_path: Path) -> None:
    run = RunState(run_files(tmp_path, bound_by_learner(6), "run.steps=100"))
    with living() as process:
        Roster(tmp_path).set("test", [entry_of("controller", 0, process.pid)])
        run.update()
        assert (run.state, run.step) == (RUNNING, 7)
        assert run.time_left == "3:06"  # 93 steps of 2 s
        assert [row.state for row in run.rows] == ["running"]
    run.update()
    assert (run.state, run.time_left) == (OVER, "")


def test_a_run_that_has_its_steps_is_finished_and_one_elsewhere_says_where(tmp_path: Path) -> None:
    run = RunState(run_files(tmp_path, bound_by_learner(6), "run.steps=7"))
    run.update()
    assert run.state == FINISHED
    Roster(tmp_path).set("test", [Entry(role="controller", index=0, pid=1, host="node-7", started=0.0)])
    run.update()
    assert run.state == "on node-7"


def test_the_verdict_comes_with_the_key_to_change_and_only_from_the_same_launch(tmp_path: Path) -> None:
    run = state_of(run_files(tmp_path, bound_by_learner(12)))
    assert run.limit == "learner"
    assert run.verdict.startswith("learner-bound, 40% of the time is lost")
    assert "raise learner.tokens_per_microbatch from 8192 to 13654" in run.verdict
    first_steps = [{**line, "step": line["step"] + 13} for line in bound_by_learner(2)]
    resumed = state_of(run_files(tmp_path, [*bound_by_learner(12), *first_steps]))
    assert (resumed.limit, resumed.verdict) == ("", "")


def test_alarms_are_those_that_have_not_ended_also_after_a_rollback(tmp_path: Path) -> None:
    run_files(tmp_path, [])
    run, file = RunState(tmp_path), MetricsFile(tmp_path, go_on=True)
    file.log({"step": 1, "learner/ess": 0.9})
    file.log({"step": 2, "learner/ess": 0.3})
    run.update()
    assert ["learner/ess is 0.3" in alarm for alarm in run.alarms] == [True]
    file.roll_back(1, 1)
    run.update()
    assert run.alarms == []
    file.close()


def test_a_run_that_has_only_begun_has_nothing_to_show_and_no_run_is_an_error(tmp_path: Path) -> None:
    run = state_of(run_files(tmp_path / "run", []))
    (tmp_path / "run" / FILE_NAME).unlink()
    run.update()
    assert (run.state, run.step, run.last, run.verdict, run.alarms, run.notes, run.work) == (
        OVER,
        0,
        {},
        "",
        [],
        [],
        {},
    )
    with pytest.raises(UserError, match="no run there"):
        RunState(tmp_path)


def test_the_work_of_workers_is_that_of_the_newest_batch(tmp_path: Path) -> None:
    run_dir = run_files(finished_run(tmp_path), [json.loads('{"step": 1}')])
    (work,) = state_of(run_dir).work.values()
    assert work.groups == 2
    assert work.tokens > 0


def test_notes_are_the_newest_lines_of_the_log_but_those_of_steps(tmp_path: Path) -> None:
    run_dir = run_files(tmp_path, [])
    (run_dir / "run.log").write_text("16:00:00  starting Ray\n16:00:01  step 1/9  reward 0.5\n16:00:02  verdict: x\nha")
    assert state_of(run_dir).notes == ["16:00:00  starting Ray", "16:00:02  verdict: x"]
    (tmp_path / "long").write_text("first line\nsecond line\nthird\n")
    assert last_lines(tmp_path / "long", 12) == ["third"]
    assert last_lines(tmp_path / "none") == []
