from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from asyncdapo.metrics.progress import COLUMNS
from asyncdapo.metrics.sparkline import sparkline
from asyncdapo.metrics.terminal import NUM_RECENT_STEPS, LiveTable, terminal_of
from asyncdapo.metrics.verdict.advice import KEYS
from tests.metrics.accounts_of import lines_of, lost_to


@pytest.fixture
def terminal() -> StringIO:
    return StringIO()


def live_table(terminal: StringIO, times_s: list[float], width: int = 140, height: int = 40) -> LiveTable:
    console = Console(file=terminal, force_terminal=True, width=width, height=height, color_system=None)
    return LiveTable(console, "quickstart", 36, dict.fromkeys(KEYS, 2.0), now=lambda: times_s[0])


def last_picture(terminal: StringIO) -> str:
    return terminal.getvalue().rpartition("quickstart")[2]


def test_the_last_steps_stand_in_a_table_above_what_the_run_waits_for_and_how_long(terminal: StringIO):
    times_s = [100.0]
    live = live_table(terminal, times_s)
    for step in range(1, NUM_RECENT_STEPS + 3):
        live.log({"step": step, "reward/mean": step / 1000})
    live.status("learner waits for batch 15: rollout")
    times_s[0] += 42
    live.status("learner waits for batch 15: rollout")
    live.close()
    picture = last_picture(terminal)
    assert "0.002" not in picture
    assert "0.003" in picture
    assert "0.014" in picture
    assert picture.index("0.014") < picture.index("learner waits for batch 15: rollout  42 s")


def test_a_status_is_over_with_the_next_step(terminal: StringIO):
    live = live_table(terminal, [0.0])
    live.status("learner waits")
    live.log({"step": 1})
    live.close()
    assert "learner waits" not in last_picture(terminal)


def test_a_note_scrolls_by_above_the_table(terminal: StringIO):
    live = live_table(terminal, [0.0])
    live.note("weights: [gloo] travels")
    live.close()
    assert "weights: [gloo] travels" in terminal.getvalue()
    assert "gloo" not in last_picture(terminal)


LINE = {
    "step": 1036,
    "reward/mean": -0.924,
    "eval/accuracy": 0.953,
    "rollout/tokens_per_s": 12938,
    "learner/tokens_per_s": 105059,
    "replay/staleness_mean": 0.75,
    **lost_to("rollout", 0.34),
    "time/wall_s": 123456,
    "eval/greedy_accuracy": 0.988,
    "reward/failed_ratio": 0.03,
}


def drawn(terminal: StringIO, width: int, line: dict[str, float]) -> tuple[set[str], list[str]]:
    """The words of the headings, and of the row."""
    live = live_table(terminal, [0.0], width)
    live.log(line)
    live.close()
    *headings, row = last_picture(terminal).replace("\x1b[?25h", "").partition("verdict")[0].rstrip().splitlines()[1:]
    return {word for heading in headings for word in heading.split()}, row.split()


def test_on_80_columns_every_heading_and_number_is_whole(terminal: StringIO):
    headings, row = drawn(terminal, 80, LINE)
    assert headings == {word for column in COLUMNS for word in column.title.split()} | {"step"}
    assert row == ["1036", "-0.924", "12,938", "105,059", "0.75", "rollout", "34:17:36", "0.953", "0.988", "3%"]


def test_a_narrow_terminal_has_fewer_columns_and_cuts_none(terminal: StringIO):
    headings, row = drawn(terminal, 50, LINE)
    assert headings == {"step", "reward", "rollout", "tok/s", "accuracy", "greedy", "failed"}
    assert row == ["1036", "-0.924", "12,938", "0.953", "0.988", "3%"]


def test_a_column_that_no_step_has_a_number_for_is_left_out(terminal: StringIO):
    headings, row = drawn(terminal, 80, {"step": 1, "reward/mean": 0.5, "reward/failed_ratio": 0.0})
    assert (headings, row) == ({"step", "reward"}, ["1", "0.500"])


def test_a_step_s_progress_stands_below_the_table_and_the_time_left_above_it(terminal: StringIO):
    live = live_table(terminal, [0.0])
    live.progress("batch 1: 3/16 groups")
    live._live.refresh()
    assert last_picture(terminal).endswith("batch 1: 3/16 groups")
    live.log({"step": 6, "time/step_s": 20.0})
    live.progress("batch 7: 7/16 groups")
    live._live.refresh()
    assert last_picture(terminal).startswith(", 36 steps, about 10:00 left")
    assert last_picture(terminal).endswith("batch 7: 7/16 groups")
    live.close()


def test_on_80_by_24_everything_has_room_but_the_older_steps(terminal: StringIO):
    live = live_table(terminal, [0.0], width=80, height=24)
    for line in lines_of(20, loop={"wait": 0.1, "train": 0.9}, workers={"generate": 0.5, "lease": 0.5}):
        live.log(LINE | {"reward/mean": line["step"] / 100} | line | lost_to("learner", 0.4))
    live.progress("batch 21: 7/16 groups")
    live.status("controller waits for learner: train step 20, and much else of which there is a lot to say here")
    live._live.refresh()
    picture = last_picture(terminal)
    lines = picture.splitlines()
    assert len(lines) <= 23
    assert all(len(line) <= 80 for line in lines)
    assert f"{sparkline(range(21), 50)}  0.010 → 0.210" in picture
    said = " ".join(picture.split())
    assert "verdict learner-bound, 40% of the time is lost: workers get no lease" in said
    assert "raise learner.tokens_per_microbatch from 2 to 4" in said
    assert said.endswith("a lot to say here 0 s")
    assert {"0.200", "0.210"} < set(said.split())
    assert "0.090" not in said
    live.close()


@pytest.mark.parametrize(
    ("is_terminal", "environ", "live"),
    [
        (True, {}, True),
        (True, {"JPY_PARENT_PID": "7"}, False),
        (False, {}, False),
        (False, {"FORCE_COLOR": "1"}, False),
    ],
)
def test_a_picture_is_drawn_on_a_terminal_and_nowhere_else(monkeypatch, is_terminal, environ, live):
    monkeypatch.setenv("TERM", "xterm")
    stream = StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal, raising=False)
    assert (terminal_of(stream, environ) is not None) == live
