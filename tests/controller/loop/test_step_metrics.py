"""Step metrics: alarms are said with the line that raises them; the counters of a checkpoint."""

from __future__ import annotations

import math
import time

from asyncdapo.controller.loop.step_metrics import StepMetrics, counters_of

LEARNER = {"learner/tokens": 10.0, "learner/entropy": 1.0, "learner/bad_updates": 0.0}
REPLAY = {
    "rollout/arrived_tokens": 10.0,
    "replay/dropped_ratio": 0.0,
    "filter/kept_ratio": 0.5,
    "rollout/arrived_groups": 200,
}


class NoteTaker:
    """A reporter of which only the notes are read."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[dict[str, float]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def log(self, line: dict[str, float]) -> None:
        self.lines.append(line)


def lines_of(reporter: NoteTaker, first: dict | None = None, last: dict | None = None) -> StepMetrics:
    lines = StepMetrics(reporter, first or {}, last or {}, started=0.0, keys={})
    lines.begin()
    lines.clock.enter("wait")
    return lines


def hold(lines: StepMetrics, step: int, learner: dict | None = None, replay: dict | None = None) -> None:
    lines.clock.enter("wait")
    lines.hold(step, LEARNER | (learner or {}), REPLAY | (replay or {}))


def test_an_alarm_is_a_note_when_it_begins() -> None:
    reporter = NoteTaker()
    lines = lines_of(reporter)
    hold(lines, 1)
    assert reporter.notes == []
    hold(lines, 2, replay={"filter/kept_ratio": 0.05})
    hold(lines, 3, replay={"filter/kept_ratio": 0.05})
    [note] = reporter.notes
    assert note.startswith("filter warning: filter/kept_ratio is 0.05, below 0.1: ")


def test_a_moment_between_two_lines_has_a_training_time_between_theirs_in_a_run_that_resumes_too() -> None:
    lines = lines_of(reporter := NoteTaker(), last={"step": 6, "time/wall_s": 5.0})
    assert lines.wall_of(6) == 5.0
    hold(lines, 7)
    lines.write()
    between = lines.wall_at(time.monotonic())
    hold(lines, 8)
    lines.write()
    assert 5.0 <= reporter.lines[0]["time/wall_s"] <= between <= reporter.lines[1]["time/wall_s"] == lines.wall_of(8)


def test_a_run_that_resumes_remembers_its_first_entropy_and_its_skipped_updates() -> None:
    reporter = NoteTaker()
    lines = lines_of(reporter, first={"learner/entropy": 20.0}, last={"time/wall_s": 5.0, "learner/bad_updates": 2.0})
    hold(lines, 7, learner={"learner/bad_updates": 2.0})
    [note] = reporter.notes
    assert note.startswith("learner warning: learner/entropy is 1, below a tenth of the first step's 20: ")


def test_the_counters_of_a_checkpoint_are_those_of_the_line() -> None:
    line = {"filter/gen_batches": 3, "filter/prompts_consumed": 50.0, "replay/train_steps": 2, "reward/mean": math.nan}
    assert counters_of(line) == {"gen_batches": 3, "prompts_consumed": 50, "train_steps": 2}
    assert counters_of({}) == {"gen_batches": 0, "prompts_consumed": 0, "train_steps": 0}
